"""The stages at the live endpoint: deploy and benchmark; and serving in the foreground."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from export.signature import DetectorSignature
from pipeline.accuracy import Ladder, canvases_of
from pipeline.endpoint import (
    check_served_precision,
    check_server,
    deployed,
    docker_line,
    dynamic_batching,
    instance_group,
    live_endpoint,
    not_executable,
    publish_version,
    repository_of,
    repository_path,
    serve_previous,
    served_version_of,
    uses_gpu,
)
from pipeline.endpoint_proof import prove
from pipeline.model_files import (
    ENGINE,
    ONNX_RUNTIME,
    ModelFile,
    precision_of,
    runner_in_process,
    served_file,
    serving_of,
)
from pipeline.served_engine import check_engine_built, check_engine_runs
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import dataset_of
from serving.client import check_reachable
from serving.config import BenchmarkConfig, ServingConfig
from serving.load_generator import closed_loop, measure_in_process, open_loop
from serving.model_config import model_config_for
from serving.model_repository import ServedVersion, config_digest, served_version
from serving.servers import SERVERS, Ports, ServerError
from serving.servers.running import reason_in_log

DEPLOYMENT_FILE = "deployment.json"
SERVER_LOG = "server.log"
BENCHMARK_FILE = "benchmark.json"
SAMPLES_FILE = "latencies_seconds.npz"


def deploy(context: StageContext) -> StageResult:
    """Publish a model version, start the server, and prove the live endpoint with images and AP.

    Nothing is published before the server is known to be there.
    """
    config = serving_of(context)
    if config.serves_engine:
        check_engine_built(context.inputs["engine"].manifest.facts, config)
    check_server(config)
    if config.serves_engine:
        check_engine_runs(context.inputs["engine"].path(ENGINE), config)
    check_served_precision(precision_of(context.inputs), config)
    if config.url is not None:
        check_reachable(config.url)
    served = served_file(context.inputs, config)
    signature = DetectorSignature.read(context.inputs["export"].directory)
    rows = {row["name"]: row for row in context.inputs["validate"].manifest.facts["rows"]}
    provenance = {
        "run": context.run_dir.name,
        "recipe": context.recipe.name,
        "artifact": served.artifact.manifest.content_digest,
        "AP": rows[served.row].get("AP"),  # none where the engine did not run
    }
    repository = repository_of(config, context.run_dir)
    previous = served_version(repository, config.model_name)
    version = publish_version(config, repository, served.path, signature, provenance)
    if context.inputs["export"].manifest.facts.get("nms") != "outside":  # they run the file alone
        _write_other_configs(context, config, signature, provenance)
    facts = _described(config, repository, version)
    ladder = Ladder(
        dataset_of(context.inputs["data"], "validation"), signature, context, context.recipe.sections["parity"]
    )
    if facts["status"] == "not run":
        line = f"{facts['reason']}. On a machine with Docker:\n{facts['container']['command']}"
        context.console.print(line, soft_wrap=True, markup=False)
        ladder.add_not_run("Triton", facts["reason"])
        facts["rows"] = ladder.rows
    else:
        previous = None if previous is None or previous.version == version else previous
        measured = served.row if rows[served.row].get("AP") is not None else ONNX_RUNTIME
        ladder.add_earlier(measured, context.inputs["validate"])
        facts |= _proven_or_rolled_back(context, ladder, served, config, measured, previous)
    facts["config_digest"] = config_digest(repository, config.model_name)
    (context.directory / DEPLOYMENT_FILE).write_text(json.dumps(facts, indent=1))
    return StageResult(facts=facts, gates=ladder.gates)


def _write_other_configs(
    context: StageContext, config: ServingConfig, signature: DetectorSignature, provenance: dict[str, Any]
) -> None:
    """The same model's configuration for Triton's own backends, for other servers."""
    for backend in ("onnxruntime", "tensorrt"):
        other = model_config_for(
            signature,
            name=config.model_name,
            backend=backend,
            provenance=provenance,
            instance_group=instance_group(config, backend),
            dynamic_batching=dynamic_batching(config),
            num_threads=config.num_threads or 0,
        )
        (context.directory / f"config.{backend}.pbtxt").write_text(other.to_pbtxt())


def _described(config: ServingConfig, repository: Path, version: int) -> dict[str, Any]:
    """The facts of a deployment that are known before it is proven."""
    reason = not_executable(config)
    return {
        "status": "served" if reason is None else "not run",
        "reason": reason or "",
        "model_name": config.model_name,
        "version": version,
        "rolled_back_to": None,
        "server": config.url or config.server,
        "backend": config.backend_of_server,
        "device": "cuda" if uses_gpu(config) else "cpu",
        "repository": str(repository.absolute()) if config.repository else "",
        "container": {
            "command": docker_line(config, repository),
            "executed": config.server == "container" and reason is None,
            "reason": reason or ("" if config.server == "container" else f"serving.server is {config.server}"),
        },
    }


def _proven_or_rolled_back(
    context: StageContext,
    ladder: Ladder,
    served: ModelFile,
    config: ServingConfig,
    measured: str,
    previous: ServedVersion | None,
) -> dict[str, Any]:
    """The facts of the proof; where it fails or cannot end, ``previous`` is what is served afterwards."""
    repository = repository_of(config, context.run_dir)
    try:
        with live_endpoint(config, repository, context.directory / SERVER_LOG) as url:
            facts = prove(context, ladder, url, served, config, measured)
    except BaseException:
        if previous is not None:
            serve_previous(config, repository, previous)
        raise
    if previous is None or all(gate.passed for gate in ladder.gates):
        return facts
    serve_previous(config, repository, previous)
    note = f"version {previous.version}, served before, is served again"
    ladder.gates = [
        gate if gate.passed else dataclasses.replace(gate, reason="; ".join(filter(None, (gate.reason, note))))
        for gate in ladder.gates
    ]
    context.console.print(f"deploy: the new version failed its proof; {note}", markup=False)
    return facts | {"rolled_back_to": previous.version}


def benchmark(context: StageContext) -> StageResult:
    """Latency and throughput of the endpoint under closed and open loop, and of the same file in process beside it."""
    config = serving_of(context)
    load: BenchmarkConfig = context.recipe.sections["benchmark"]
    reason = not_executable(config)
    if reason is not None:
        return StageResult(facts={"status": "not run", "reason": reason})
    signature = DetectorSignature.read(context.inputs["export"].directory)
    dataset = dataset_of(context.inputs["data"], "validation")
    images = [canvas for _, canvas, _ in canvases_of(dataset, signature, load.num_images)]
    # Same session options as the server's, before it runs: two sessions at once would share the cores.
    with runner_in_process(served_file(context.inputs, config), signature, config) as runner:
        in_process = measure_in_process(
            runner.run, images, seconds=load.seconds_per_point, warmup_requests=load.warmup_requests
        )
    results = {"in_process": in_process}
    repository = repository_of(config, context.run_dir)
    with live_endpoint(config, repository, context.directory / SERVER_LOG) as url:
        closed = []
        for concurrency in load.concurrencies:
            result = closed_loop(
                url,
                config.model_name,
                images,
                concurrency=concurrency,
                seconds=load.seconds_per_point,
                warmup_requests=load.warmup_requests,
                timeout_seconds=config.request_timeout_seconds,
            )
            results[f"closed_{concurrency}"] = result
            closed.append({"concurrency": concurrency, **result.facts()})
            context.console.print(
                f"benchmark: concurrency {concurrency}: {result.throughput:.1f} images/s, "
                f"p50 {result.percentile_ms(50):.1f} ms, p99 {result.percentile_ms(99):.1f} ms",
                markup=False,
            )
        opened = []
        for rate in load.rates_for(max(row["throughput"] for row in closed)):
            result = open_loop(
                url,
                config.model_name,
                images,
                request_rate=rate,
                seconds=load.seconds_per_point,
                seed=load.seed,
                warmup_requests=load.warmup_requests,
                timeout_seconds=config.request_timeout_seconds,
            )
            results[f"open_{rate:.1f}"] = result
            opened.append({"request_rate": rate, **result.facts()})
            context.console.print(
                f"benchmark: {rate:.1f} requests/s: p99 {result.percentile_ms(99):.1f} ms", markup=False
            )
    np.savez_compressed(
        context.directory / SAMPLES_FILE, **{name: result.latencies_seconds for name, result in results.items()}
    )
    facts = {
        "status": "measured",
        "closed_loop": closed,
        "open_loop": opened,
        "in_process": in_process.facts(),
        "serving_overhead_ms": _alone(closed)["p50_ms"] - in_process.percentile_ms(50),
        "num_images": len(images),
        "objective": {"max_p99_ms": load.max_p99_ms},
    }
    (context.directory / BENCHMARK_FILE).write_text(json.dumps(facts, indent=1))
    return StageResult(facts=facts, gates=_load_gates(closed, opened, load))


def _load_gates(closed: list[dict[str, Any]], opened: list[dict[str, Any]], load: BenchmarkConfig) -> list[Gate]:
    failures = sum(row["num_failures"] for row in closed + opened)
    gates = [Gate(name="failed requests", value=failures, limit=0, passed=failures == 0)]
    if load.max_p99_ms is not None:
        p99 = _alone(closed)["p99_ms"]
        gates.append(
            Gate(
                name="p99 latency in ms at concurrency 1",
                value=p99,
                limit=load.max_p99_ms,
                passed=p99 <= load.max_p99_ms,
            )
        )
    return gates


def _alone(closed: list[dict[str, Any]]) -> dict[str, Any]:
    """The closed-loop point of one request at a time, which ``BenchmarkConfig`` always has."""
    return next(row for row in closed if row["concurrency"] == 1)


def serve_in_foreground(run_dir: Path, ports: Ports, console: Console) -> None:
    """Serve a run's deployed model until Ctrl-C.

    Raises:
        ServerError: the server cannot start, or ends by itself.
    """
    facts = deployed(run_dir).manifest.facts
    server = facts["server"] if facts["server"] in SERVERS else "wheel"
    log_path = run_dir / SERVER_LOG
    with SERVERS[server].start(
        repository_path(facts, run_dir),
        [facts["model_name"]],
        ports=ports,
        log_path=log_path,
        use_gpu=facts["device"] == "cuda",
    ) as running:
        for line in (
            f"{facts['model_name']} version {served_version_of(facts)} is ready",
            f"  gRPC     {running.grpc_url}",
            f"  HTTP     {running.http_url}",
            f"  metrics  {running.metrics_url}/metrics",
            f"  log      {log_path}",
            f"  try      python -m pipeline detect IMAGE --url {shlex.quote(running.grpc_url)}",
        ):
            console.print(line, markup=False)
        status = running.wait()
        raise ServerError(
            f"the server of {facts['model_name']} ended by itself with status {status}: {reason_in_log(log_path)}. "
            f"See {log_path}; the same command starts it again."
        )

"""The stages at the live endpoint: deploy and benchmark; and serving in the foreground."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from export.parity import MatchResult, combined, match_detections
from export.runners import OnnxRuntimeRunner
from export.signature import Detections, DetectorSignature
from pipeline.accuracy import ON_CANVAS, REFERENCE, AccuracyTable, canvases_of
from pipeline.endpoint import (
    deployed,
    docker_line,
    dynamic_batching,
    has_gpu,
    live_endpoint,
    not_executable,
    publish_version,
    repository_of,
    repository_path,
    runner_of,
)
from pipeline.export_stages import ENGINE, ONNX_MODEL
from pipeline.stage import Gate, StageContext, StageResult
from pipeline.training_stages import dataset_of
from serving.client import run_concurrently
from serving.config import BenchmarkConfig, ServingConfig
from serving.load_generator import closed_loop, measure_in_process, open_loop
from serving.model_config import InstanceGroup, model_config_for
from serving.servers import SERVERS, Ports

DEPLOYMENT_FILE = "deployment.json"
SERVER_LOG = "server.log"
BENCHMARK_FILE = "benchmark.json"
SAMPLES_FILE = "latencies_seconds.npz"
CONCURRENCY = 8
NUM_GOLDEN_IMAGES = 20


def deploy(context: StageContext) -> StageResult:
    """Publish a model version, start the server, and prove the live endpoint with images and AP."""
    config: ServingConfig = context.recipe.sections["serving"]
    artifact = context.inputs["engine" if config.backend_of_server == "tensorrt" else "export"]
    model_file = artifact.path(ENGINE if config.backend_of_server == "tensorrt" else ONNX_MODEL)
    signature = DetectorSignature.read(artifact.directory)
    repository = repository_of(config, context.run_dir)
    rows = {row["name"]: row for row in context.inputs["validate"].manifest.facts["rows"]}
    provenance = {
        "run": context.run_dir.name,
        "recipe": context.recipe.name,
        "artifact": artifact.manifest.content_digest,
        "AP": rows["ONNX Runtime"]["AP"],
    }
    version = publish_version(config, repository, model_file, signature, provenance)
    for backend in ("onnxruntime", "tensorrt"):
        other = model_config_for(
            signature,
            name=config.model_name,
            backend=backend,
            provenance=provenance,
            instance_group=InstanceGroup(kind="GPU" if has_gpu() else "CPU", count=config.num_instances),
            dynamic_batching=dynamic_batching(config),
            num_threads=config.num_threads or 0,
        )
        (context.directory / f"config.{backend}.pbtxt").write_text(other.to_pbtxt())
    reason = not_executable(config)
    facts: dict[str, Any] = {
        "model_name": config.model_name,
        "version": version,
        "server": config.url or config.server,
        "backend": config.backend_of_server,
        "repository": str(repository.absolute()) if config.repository else "",
        "container": {
            "command": docker_line(config, repository),
            "executed": config.server == "container" and reason is None,
            "reason": reason or ("" if config.server == "container" else f"serving.server is {config.server}"),
        },
    }
    table = AccuracyTable(
        dataset_of(context.inputs["data"], "validation"), signature, context, reference_ap=rows[REFERENCE]["AP"]
    )
    if reason is not None:
        context.console.print(f"{reason}. On a machine with Docker:\n{facts['container']['command']}", soft_wrap=True)
        table.add_not_run("Triton", reason)
        facts |= {"status": "not run", "reason": reason, "rows": table.rows}
    else:
        with live_endpoint(config, repository, context.directory / SERVER_LOG) as url:
            facts |= {"status": "served"} | _proof(
                context, config, table, url, model_file, rows[ON_CANVAS]["AP"], context.inputs["export"].directory
            )
    (context.directory / DEPLOYMENT_FILE).write_text(json.dumps(facts, indent=1))
    return StageResult(facts=facts, gates=table.gates)


def _proof(
    context: StageContext,
    config: ServingConfig,
    table: AccuracyTable,
    url: str,
    model_file: Path,
    on_canvas: float,
    onnx_directory: Path,
) -> dict[str, Any]:
    """Golden images, AP at concurrency 1 and with mixed batches, and their agreement; gates go into ``table``."""
    limits = context.recipe.sections["parity"]
    with runner_of(config, url) as runner:
        alone = [runner.run(canvas[None])[0] for canvas in table.canvases()]
        with OnnxRuntimeRunner(onnx_directory / ONNX_MODEL, runner.signature) as in_process:
            golden = [in_process.run(canvas[None])[0] for canvas in table.canvases(NUM_GOLDEN_IMAGES)]
        before = runner.statistics()
        mixed = run_concurrently(
            url,
            config.model_name,
            table.canvases(),
            concurrency=CONCURRENCY,
            timeout_seconds=config.request_timeout_seconds,
        )
        batching = runner.statistics() - before
        signature = runner.signature
    for name, found in (("Triton, concurrency 1", alone), (f"Triton, concurrency {CONCURRENCY}", mixed)):
        table.add(name, found, model_file, on_canvas, limits.max_ap_drop_served)
    matched = _matched(golden, alone[: len(golden)], signature, score_floor=0.0)
    invariant = _matched(alone, mixed, signature, score_floor=limits.min_matched_score)
    table.gates += [
        Gate(
            name="golden images through the endpoint: detections without a partner",
            value=matched.num_unmatched,
            limit=0,
            passed=matched.num_unmatched == 0,
            reason=f"{matched.num_matched} detections on {matched.num_images} images, against ONNX Runtime in process",
        ),
        Gate(
            name="batch invariance, Triton: detections that change in mixed batches",
            value=invariant.num_unmatched,
            limit=0,
            passed=invariant.num_unmatched == 0,
            reason=f"above score {limits.min_matched_score}; mean batch {batching.mean_batch_size:.2f}",
        ),
    ]
    return {
        "rows": table.rows,
        "golden_images": {"num": matched.num_images, "num_unmatched": matched.num_unmatched},
        "batch_invariance": dataclasses.asdict(invariant),
        "mean_batch_size": batching.mean_batch_size,
        "concurrency": CONCURRENCY,
    }


def _matched(
    reference: list[Detections], candidate: list[Detections], signature: DetectorSignature, *, score_floor: float
) -> MatchResult:
    return combined(
        match_detections(
            a,
            b,
            score_threshold=signature.score_threshold,
            max_detections=signature.max_detections,
            score_floor=score_floor,
        )
        for a, b in zip(reference, candidate, strict=True)
    )


def benchmark(context: StageContext) -> StageResult:
    """Latency and throughput of the endpoint under closed and open loop, and of ONNX Runtime in process beside it."""
    config: ServingConfig = context.recipe.sections["serving"]
    load: BenchmarkConfig = context.recipe.sections["benchmark"]
    reason = not_executable(config)
    if reason is not None:
        return StageResult(facts={"status": "not run", "reason": reason})
    export_directory = context.inputs["export"].directory
    signature = DetectorSignature.read(export_directory)
    dataset = dataset_of(context.inputs["data"], "validation")
    images = [canvas for _, canvas, _ in canvases_of(dataset, signature, load.num_images)]
    # Same session options as the server's, before it runs: two sessions at once would share the cores.
    with OnnxRuntimeRunner(
        export_directory / ONNX_MODEL, signature, num_threads=config.num_threads, allow_spinning=config.allow_spinning
    ) as runner:
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
                f"p50 {result.percentile_ms(50):.1f} ms, p99 {result.percentile_ms(99):.1f} ms"
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
            context.console.print(f"benchmark: {rate:.1f} requests/s: p99 {result.percentile_ms(99):.1f} ms")
    np.savez_compressed(
        context.directory / SAMPLES_FILE, **{name: result.latencies_seconds for name, result in results.items()}
    )
    facts = {
        "status": "measured",
        "closed_loop": closed,
        "open_loop": opened,
        "in_process": in_process.facts(),
        "serving_overhead_ms": closed[0]["p50_ms"] - in_process.percentile_ms(50),
        "num_images": len(images),
        "objective": {"max_p99_ms": load.max_p99_ms},
    }
    (context.directory / BENCHMARK_FILE).write_text(json.dumps(facts, indent=1))
    return StageResult(facts=facts, gates=_load_gates(closed, opened, load))


def _load_gates(closed: list[dict[str, Any]], opened: list[dict[str, Any]], load: BenchmarkConfig) -> list[Gate]:
    failures = sum(row["num_failures"] for row in closed + opened)
    gates = [Gate(name="failed requests", value=failures, limit=0, passed=failures == 0)]
    if load.max_p99_ms is not None:
        p99 = closed[0]["p99_ms"]
        gates.append(
            Gate(
                name=f"p99 latency in ms at concurrency {closed[0]['concurrency']}",
                value=p99,
                limit=load.max_p99_ms,
                passed=p99 <= load.max_p99_ms,
            )
        )
    return gates


def serve_in_foreground(run_dir: Path, ports: Ports, console: Console) -> None:
    """Serve a run's deployed model until Ctrl-C."""
    facts = deployed(run_dir).manifest.facts
    server = facts["server"] if facts["server"] in SERVERS else "wheel"
    log_path = run_dir / SERVER_LOG
    with SERVERS[server].start(
        repository_path(facts, run_dir), [facts["model_name"]], ports=ports, log_path=log_path, use_gpu=has_gpu()
    ) as running:
        console.print(f"{facts['model_name']} version {facts['version']} is ready")
        console.print(
            f"  gRPC     {running.grpc_url}\n  HTTP     {running.http_url}\n  metrics  {running.metrics_url}/metrics"
        )
        console.print(f"  log      {log_path}")
        console.print(f"  try      python -m pipeline detect IMAGE --url {shlex.quote(running.grpc_url)}")
        running.wait()

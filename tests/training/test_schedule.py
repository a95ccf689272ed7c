from __future__ import annotations

from training.schedule import DistillationSchedule, Phase


def test_the_windows_are_half_open() -> None:
    schedule = DistillationSchedule(distill_from_iter=10, distill_until_iter=20, freeze_backbone_until_iter=5)
    found = {t: schedule.phase(t) for t in (0, 4, 5, 9, 10, 19, 20)}
    assert found == {
        0: Phase(distill=False, freeze_backbone=True),
        4: Phase(distill=False, freeze_backbone=True),
        5: Phase(distill=False, freeze_backbone=False),
        9: Phase(distill=False, freeze_backbone=False),
        10: Phase(distill=True, freeze_backbone=False),
        19: Phase(distill=True, freeze_backbone=False),
        20: Phase(distill=False, freeze_backbone=False),
    }


def test_without_an_end_distillation_goes_on() -> None:
    assert DistillationSchedule(distill_from_iter=0).phase(10**9).distill

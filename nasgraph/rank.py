"""The command ``nasgraph rank``: does the supernet of a run order architectures as training alone would?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from nasgraph import pretraining, registry, workers
from nasgraph.config import Config
from nasgraph.console import Display
from nasgraph.errors import ConfigError
from nasgraph.ranking import RankReport, rank_report, stand_alone
from nasgraph.run import SUPERNET, Run
from nasgraph.space import Architecture


def rank_run(
    run: Run,
    settings: Config,
    n: int,
    seed: int = 0,
    truth: str = "train",
    proxies: Sequence[str] = ("ntk_cond",),
    scores: Sequence[str] = ("accuracy",),
    quiet: bool = False,
) -> RankReport:
    """The report of the supernet that ``run`` trained; ``rank.csv`` and ``rank.json`` in its folder hold it too.

    Args:
        settings: the run's config, or with other ``train`` or ``seeds`` for the truth.
        truth: ``train``: each architecture is trained alone as ``settings`` say; or ``module:function``, a function of
            an architecture.

    Raises: ConfigError: the run has no supernet, or it is not trained yet.
    """
    if run.config.supernet is None:
        raise ConfigError(f"{run.folder} has no supernet, so no ranking to judge: its config has no section supernet")
    if "supernet" not in run.facts:
        raise ConfigError(f"the supernet of {run.folder} is not trained yet: nasgraph resume {run.folder}")
    torch.set_num_threads(settings.threads)
    made = workers.parts(settings)
    run.check("space", made.space.fingerprint())
    run.check("task", made.task.fingerprint())
    pretraining.check(run.folder / SUPERNET, run.facts["supernet"]["sha256"])
    supernet = pretraining.load(settings, made.space, made.task, run.folder / SUPERNET)
    judge: Callable[[Architecture], float]
    if truth == "train":
        judge = stand_alone(made.space, made.task, made.settings, settings.seeds)
    else:
        judge = registry.resolve("objectives", truth)
    with Display(quiet).phase("rank", n) as phase:
        report = rank_report(
            supernet, judge, n=n, seed=seed, proxies=proxies, scores=scores,
            training_seconds=run.facts["seconds"].get("supernet"), on_architecture=lambda *_: phase.advance(),
        )  # fmt: skip
    report.to_csv(run.folder / "rank.csv")
    report.to_json(run.folder / "rank.json")
    return report

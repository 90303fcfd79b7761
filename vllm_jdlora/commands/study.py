"""`jdlora study`: all quality figures in one run that can be stopped and gone on with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.evaluation_arguments import add_arguments, baseline_names, check_packages, share
from vllm_jdlora.commands.terminal import positive, progress_bars


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "study",
        help="all quality figures in one run: this compressor, baselines, sweeps, ablations, plots",
        description="Compress at several budgets, compare with other methods, sweep rank and clusters, and write "
        "records, collections, summary.json and plots to OUTPUT. Stopped at any point, the same command goes on; "
        "nothing is measured twice. The sweep and leakage take 24 test items of each task without --limit.",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to create, or to go on with")
    add_arguments(parser)
    parser.add_argument(
        "--parts",
        nargs="+",
        metavar="PART",
        help="of ours, baselines, sweep, ranks, leakage, convergence, long (default: all; long with --long)",
    )
    parser.add_argument(
        "--budget", nargs="+", type=share, metavar="SHARE", help="of the bytes (default: 1/32 1/16 1/8 1/4)"
    )
    parser.add_argument(
        "--method", default="full", metavar="NAME", help="of the part ours, as in jdlora compress (default: full)"
    )
    parser.add_argument(
        "--metric",
        choices=["frobenius", "activation", "fisher"],
        default="activation",
        help="of all fits of ours (default: activation)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text or moments that fits weigh by (default: the text that ships with the package); output errors are "
        "always measured on validation items of the tasks",
    )
    parser.add_argument(
        "--baselines", nargs="+", default=["all"], metavar="NAME", help="to compare with (default: all)"
    )
    parser.add_argument(
        "--answers-for", nargs="*", metavar="NAME", help="baselines with greedy answers (default: all), others: loss"
    )
    parser.add_argument(
        "--baseline-budget", nargs="+", type=share, metavar="SHARE", help="of the baselines (default: as --budget)"
    )
    parser.add_argument(
        "--baseline-limit",
        type=positive,
        metavar="N",
        help="first N test items of each task for the baselines, and for ours beside them (default: as --limit)",
    )
    parser.add_argument(
        "--distill",
        action="store_true",
        help="the part ours also measures its collections after the distillation of Σ, as in jdlora distill",
    )
    parser.add_argument("--long", type=Path, metavar="DIR", help="adapters of the same names, trained longer")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    check_packages()
    from vllm_jdlora.commands.study_report import print_study
    from vllm_jdlora.evaluation.distillation import ENOUGH, DistillationSettings
    from vllm_jdlora.evaluation.study.run import SUMMARY_FILE, read_summary, run_study
    from vllm_jdlora.evaluation.study.settings import BUDGETS, PARTS, StudySettings

    usual = [part for part in PARTS if part != "long" or args.long is not None]
    settings = StudySettings(
        output=args.output,
        base_model=args.base_model,
        adapters=args.adapters,
        tasks=args.tasks,
        parts=usual if args.parts is None else args.parts,
        budgets=BUDGETS if args.budget is None else args.budget,
        limit=args.limit,
        only=args.only,
        dtype=args.dtype,
        calibration=args.calibration,
        long=args.long,
        method=args.method,
        metric=args.metric,
        distillation=DistillationSettings(enough=ENOUGH) if args.distill else None,
        baselines=baseline_names(args.baselines),
        baseline_budgets=args.baseline_budget,
        baseline_limit=args.baseline_limit,
        answers_for=None if args.answers_for is None else baseline_names(args.answers_for, "--answers-for: "),
        max_new_tokens=args.max_new_tokens,
        leakage_pairs=args.leakage_pairs,
    )
    try:
        with progress_bars() as show:
            parts = run_study(settings, show)
    except KeyboardInterrupt as stop:
        stop.__notes__ = ["stopped; the same command goes on from what is measured"]
        raise
    if args.json:
        print(json.dumps(read_summary(settings.output / SUMMARY_FILE), indent=1))
    else:
        print_study(parts)
    return 0

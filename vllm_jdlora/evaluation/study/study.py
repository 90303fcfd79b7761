"""What the parts of a study share: adapters, model, second moments, collections, and what is measured already."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vllm_jdlora.adapter import Adapter, file_digest, read_adapters
from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.calibration import gather_cached
from vllm_jdlora.calibration_text import of_task, text_sha256
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.calibrated import moments_from, slices_of_all
from vllm_jdlora.evaluation.distil_collection import distil_collection
from vllm_jdlora.evaluation.evaluate import chosen
from vllm_jdlora.evaluation.model import SwitchableModel, fingerprint_of
from vllm_jdlora.evaluation.records import Record, RecordFile
from vllm_jdlora.evaluation.study.settings import StudySettings
from vllm_jdlora.evaluation.study.steps import Steps
from vllm_jdlora.evaluation.tasks import read_task
from vllm_jdlora.evaluation.variant import uncompressed

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
QUANTIZE = "int8"
"""Bases of all collections of a study."""
# Output errors are judged on so many validation items of each task: neither calibration's text, nor the test items.
_JUDGING_ITEMS = 8
_STUDY_FILE = "study.json"


class Study:
    """A study in its folder. What is costly (model, moments) is made when something is first measured with it.

    Attributes:
        settings: what is asked for.
        adapters: all of them, sorted by name; bytes are shared by all.
        measured: those whose tasks are measured.
        long: adapters of the same names trained longer; empty without.
        steps: what is finished.
        refused: name → why it could not be fitted, in the part that runs.
    """

    def __init__(self, settings: StudySettings, progress: Progress | None = None):
        self.settings = settings
        self.report: Progress = progress or (lambda stage, done, total: None)
        self.adapters = read_adapters(settings.adapters)[0]
        self.measured = chosen(self.adapters, settings.only)
        self.long = [] if settings.long is None else read_adapters([settings.long])[0]
        self.refused: dict[str, str] = {}
        self._check_same_study()
        self.steps = Steps(settings.output / "steps.jsonl")
        self._files = {path.stem: self._record_file(path.stem) for path in self._records.glob("*.jsonl")}
        self._stage, self._done, self._total = "", 0, 0

    # --- what is at hand ------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> SwitchableModel:
        return SwitchableModel.load(self.settings.base_model, dtype=self.settings.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model, without loading it."""
        return fingerprint_of(self.settings.base_model, self.settings.dtype)

    @cached_property
    def judging_texts(self) -> list[str]:
        """Validation items of all tasks that there are, as the adapters were trained on them."""
        items = [
            item
            for adapter in self.adapters
            if (self.settings.tasks / f"{adapter.name}.jsonl").is_file()
            for item in read_task(self.settings.tasks, adapter.name, split="validation", limit=_JUDGING_ITEMS).items
        ]
        return [of_task(item.instruction, item.input, item.output, chat=True) for item in items]

    @cached_property
    def judged(self) -> dict[str, Tensor]:
        """Slice name → C [d_in, d_in] of its input on the judging texts, for output errors."""
        slices = slices_of_all([*self.adapters, *self.long])
        moments = gather_cached(
            self.settings.base_model,
            self.judging_texts,
            slices,
            progress=self.report,
            cache_dir=self.settings.output,
        )
        return {part.name: moments.of(part.name) for part in slices}

    @property
    def judged_by(self) -> str:
        """What stands for `judged` in a step."""
        return text_sha256(self.judging_texts)

    def moments(self, metric: str) -> SecondMoments | None:
        """What fits weigh by: none, C of inputs (activation), with gradients (fisher)."""
        return None if metric == "frobenius" else self._weights(metric != "activation")

    @property
    def weighted_by(self) -> str:
        """What stands for the calibration in a step."""
        return "" if self.settings.calibration is None else file_digest(self.settings.calibration)

    def records(self, stem: str) -> RecordFile:
        """The records file of that name; what another one holds is found too."""
        if stem not in self._files:
            self._files[stem] = self._record_file(stem)
        return self._files[stem]

    # --- what takes time ------------------------------------------------------------------------------------------

    def collection(self, label: str, adapters: Sequence[Adapter], made: Mapping[str, Any]) -> Collection:
        """A collection in ``collections/label``: as it is there, gone on with, or new.

        made: see `recipe`.
        """
        folder = self.settings.output / "collections" / label
        what = {"collection": label, "made": made, "adapters": [adapter.sha256 for adapter in adapters]}
        if self.steps.find(what) is None or not folder.is_dir():
            share = made["max_bytes"] and Fraction(made["max_bytes"])
            compress(
                adapters,
                folder,
                rank=made["rank"],
                clusters=made["clusters"],
                method=made["method"],
                moments=self.moments(made["metric"]),
                max_bytes=None if share is None else lambda whole: int(share * whole),
                quantize=QUANTIZE,
                force=True,
                progress=self.report,
            )
            self.steps.add(f"collection {label}", what, {})
        return Collection.open(folder, verify=False)

    def distilled(self, label: str, collection: Collection) -> Collection:
        """The collection with its Σ distilled on the tasks' training items, in ``collections/label``.

        Stopped and called again, it goes on with the adapters that are left.

        Raises:
            JDLoRAError: no settings of a distillation, an adapter without task data.
        """
        settings = self.settings.distillation
        if settings is None:
            raise JDLoRAError("this study distils nothing")
        folder = self.settings.output / "collections" / label
        manifest = collection.manifest
        what = {"distilled": manifest.revision, "settings": asdict(settings), "data": self.training_data}
        if self.steps.find(what) is None or not folder.is_dir():
            distil_collection(
                collection.path,
                folder,
                base_model=self.settings.base_model,
                adapters=self.settings.adapters,
                data=self.settings.tasks,
                moments=self.moments(manifest.metric),
                settings=settings,
                dtype=self.settings.dtype,
                force=True,
                progress=self.report,
            )
            self.steps.add(f"collection {label}", what, {})
        return Collection.open(folder, verify=False)

    @cached_property
    def training_data(self) -> dict[str, str]:
        """Digest of what each adapter is distilled on: the first 80 % of its task."""
        tasks = self.settings.tasks
        return {
            adapter.name: read_task(tasks, adapter.name, split="train").sha256
            for adapter in self.adapters
            if (tasks / f"{adapter.name}.jsonl").is_file()
        }

    def recipe(
        self,
        method: str,
        *,
        rank: int | None = None,
        clusters: int | None = None,
        max_bytes: Fraction | None = None,
    ) -> dict[str, Any]:
        """How a collection is made, as `collection` takes it: with a rank and clusters, or a share of the bytes."""
        return {
            "method": method,
            "metric": self.settings.metric,
            "calibration": self.weighted_by,
            "quantize": QUANTIZE,
            "rank": rank,
            "clusters": clusters,
            "max_bytes": None if max_bytes is None else str(max_bytes),
        }

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """What `make` gives, or None where it is refused (a budget too small, say), which is noted under `name`."""
        try:
            return make()
        except JDLoRAError as error:
            self.refused[name] = str(error)
            return None

    def bytes_at(self, share: Fraction) -> int:
        """A share of what all adapters take uncompressed."""
        return int(share * uncompressed(self.adapters).bytes)

    # --- progress -------------------------------------------------------------------------------------------------

    def begin(self, stage: str, total: int) -> None:
        self._stage, self._done, self._total = stage, 0, total
        self.report(stage, 0, total)

    def tick(self, count: int = 1) -> None:
        self._done += count
        self.report(self._stage, self._done, self._total)

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _records(self) -> Path:
        return self.settings.output / "records"

    def _record_file(self, stem: str) -> RecordFile:
        return RecordFile(self._records / f"{stem}.jsonl", self._anywhere)

    def _anywhere(self, key: str) -> Record | None:
        return next((found for file in self._files.values() if (found := file.own(key)) is not None), None)

    @cached_property
    def _inputs(self) -> dict[bool, SecondMoments]:
        return {}

    def _weights(self, gradients: bool) -> SecondMoments:
        if gradients not in self._inputs:
            self._inputs[gradients] = moments_from(
                self.settings.calibration,
                self.settings.base_model,
                slices_of_all([*self.adapters, *self.long]),
                gradients=gradients,
                progress=self.report,
                cache_dir=self.settings.output,
            )
        return self._inputs[gradients]

    def _check_same_study(self) -> None:
        """A folder holds the study of one set of adapters, so that its collections and records belong together."""
        file = self.settings.output / _STUDY_FILE
        own = {"adapters": {adapter.name: adapter.sha256 for adapter in self.adapters}}
        if not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing(file) as new:
                    new.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise JDLoRAError(f"{file}: cannot be written ({error.strerror})") from error
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JDLoRAError(f"{file}: cannot be read ({error}); choose another OUTPUT") from error
        if known != own:
            raise JDLoRAError(f"{self.settings.output}: holds a study of other adapters; choose another OUTPUT")

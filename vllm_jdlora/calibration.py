"""Calibration: run the base model on text and gather second moments of each target module's input, and of gradients.

What the metrics of ``jd/metric.py`` and the refit of Σ on an adapter's own activations start from.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_jdlora.adapter import Adapter, SliceShape, file_digest
from vllm_jdlora.cache import cache_root
from vllm_jdlora.calibration_text import CHAT_TOKENS, read_texts, text_sha256
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.second_moments import FORMAT_VERSION, Origin, SecondMoments
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.moment_sums import Sums, differentiated, in_groups, mapped, watching

__all__ = [
    "SecondMoments",
    "adapter_moments",
    "calibration_texts",
    "gather",
    "gather_cached",
    "slices_of",
]

Progress = Callable[[str, int, int], None]
MAX_TOKENS = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STAGE = "calibrate"
_SEED = 0
# Sums that are kept in memory at a time; more of them take further passes over the text.
_SUMS_BYTES = 4 << 30


def calibration_texts(base_model: Path, file: Path | None = None) -> list[str]:
    """The texts of ``file`` (the package's own without one), in chat markup if the model's tokenizer has it."""
    known = _tokenizer(_checked_folder(base_model)).get_vocab()
    return read_texts(file, chat=all(token in known for token in CHAT_TOKENS))


def slices_of(base_model: Path, targets: Sequence[str]) -> list[SliceShape]:
    """The linear modules of the base model whose last name is one of ``targets``, e.g. ``q_proj``.

    Raises:
        JDLoRAError: the folder is no model's, or a target has no module.
    """
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(_checked_folder(base_model))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [
        SliceShape(name, module.out_features, module.in_features)
        for name, module in linear
        if name.rpartition(".")[2] in targets
    ]
    if missing := set(targets) - {part.name.rpartition(".")[2] for part in found}:
        have = sorted({name.rpartition(".")[2] for name, _ in linear})
        raise JDLoRAError(f"{base_model}: no module named {', '.join(sorted(missing))}; it has {', '.join(have)}")
    return found


def gather(
    base_model: Path,
    text: Sequence[str],
    slices: Sequence[SliceShape],
    *,
    gradients: bool = False,
    max_tokens_per_text: int = MAX_TOKENS,
    dtype: str = "fp32",
    device: str | None = None,
    progress: Progress | None = None,
) -> SecondMoments:
    """C = E[xxᵀ] of the input of each slice, over all positions of ``text`` but the first of each.

    The first token is an attention sink: in the residual stream and in the MLP its activations are hundreds of times
    larger than all others', they would own C, and they are the same whatever the prompt ("Massive Activations in Large
    Language Models", arXiv 2402.17762).

    With gradients also G = E[ggᵀ], g the gradient of the loss at the slice's output, the loss that of next tokens drawn
    from the model's own predictions: the factor of the Fisher information, and no text's labels decide what counts
    (Kunstner et al., "Limitations of the empirical Fisher", arXiv 1905.12558).

    Args:
        base_model: Hugging Face folder.
        text: run one by one, so there is no padding to keep out.
        slices: modules to watch. Those that read the same tensor (q, k and v; gate and up) share one matrix.
        gradients: also gather G; takes about three times as long.
        max_tokens_per_text: each text is cut there.
        dtype: of the model, ``fp32`` or ``bf16``. Sums are fp64: d_in² · 8 bytes for each distinct input, d_out² · 8
            for the gradients of each slice. What exceeds 4 GiB takes further passes over the text, and the results lie
            on disk meanwhile.
        device: default CUDA where there is one.
        progress: called as (stage, done, total), total being texts.

    Raises:
        JDLoRAError: no such model or module, a module with another d_in, no text of two tokens or more, or
            activations that are not finite.
    """
    runner = _Runner(base_model, dtype, device)
    return runner.moments(text, slices, max_tokens_per_text, progress, gradients=gradients)


def gather_cached(
    base_model: Path,
    text: Sequence[str],
    slices: Sequence[SliceShape],
    *,
    gradients: bool = False,
    max_tokens_per_text: int = MAX_TOKENS,
    dtype: str = "fp32",
    device: str | None = None,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> SecondMoments:
    """`gather`, kept in ``cache_root(cache_dir)/calibration`` by text, model, modules and settings.

    A cached file that is damaged is made again.
    """
    folder = _checked_folder(base_model)
    # config.json alone does not tell two fine-tunes of one architecture apart; hashing all weights would cost more
    # than running the model.
    weights = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*.safetensors"))
    ]
    shapes = [[part.name, part.d_in] for part in slices]
    settings = [FORMAT_VERSION, max_tokens_per_text, dtype, gradients]
    what = [text_sha256(text), file_digest(folder / "config.json"), str(folder.resolve()), weights, shapes, settings]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    file = cache_root(cache_dir) / "calibration" / f"{key[:32]}.safetensors"
    if file.is_file():
        try:
            moments = SecondMoments.load(file)
            moments.check_fit(slices)
            return moments
        except JDLoRAError:
            file.unlink(missing_ok=True)
    made = gather(
        folder,
        text,
        slices,
        gradients=gradients,
        max_tokens_per_text=max_tokens_per_text,
        dtype=dtype,
        device=device,
        progress=progress,
    )
    made.save(file)
    return made


def adapter_moments(
    base_model: Path,
    adapters: Iterable[tuple[Adapter, Sequence[str]]],
    *,
    max_tokens_per_text: int = MAX_TOKENS,
    dtype: str = "fp32",
    device: str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Adapter, SecondMoments]]:
    """The second moments C_i of each adapter's own activations: the uncompressed adapter active, on its own texts.

    One adapter at a time, so that one adapter's matrices are in memory; the model is loaded once. Arguments and
    errors as in `gather`; the slices are the adapter's.
    """
    runner = _Runner(base_model, dtype, device)
    for adapter, text in adapters:
        slices = [part.shape for part in adapter.slices.values()]
        with runner.adapted(adapter):
            yield adapter, runner.moments(text, slices, max_tokens_per_text, progress, adapter.sha256)


class _Runner:
    """A loaded model and its tokenizer."""

    def __init__(self, base_model: Path, dtype: str, device: str | None):
        folder = _checked_folder(base_model)
        if dtype not in DTYPES:
            raise JDLoRAError(f"dtype {dtype!r}: calibration runs in {' or '.join(DTYPES)}")
        self._tokenizer = _tokenizer(folder)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype
        try:
            model = _transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
        except (OSError, ValueError) as error:
            raise JDLoRAError(f"{folder}: transformers cannot load this model ({error})") from error
        self._model: Any = model.eval().requires_grad_(False).to(self._device)
        self._base = BaseModel(folder.resolve().name, file_digest(folder / "config.json"))

    def moments(
        self,
        text: Sequence[str],
        slices: Sequence[SliceShape],
        max_tokens: int,
        progress: Progress | None,
        adapter_sha256: str | None = None,
        *,
        gradients: bool = False,
    ) -> SecondMoments:
        encoded = [self._tokenizer(one, truncation=True, max_length=max_tokens)["input_ids"] for one in text]
        encoded = [tokens for tokens in encoded if len(tokens) > 1]
        if not encoded:
            raise JDLoRAError("the calibration text has no text of two tokens or more")
        modules = {part.name: self._module(part.name) for part in slices}
        with torch.inference_mode():
            inputs = self._shared_inputs(slices, modules, encoded[0])
        of_gradients = {part.name: f"{part.name}:gradients" for part in slices} if gradients else {}
        shapes = {part.name: part for part in slices}
        sides = {key: shapes[key].d_in for key in inputs.values()}
        sides |= {key: shapes[name].d_out for name, key in of_gradients.items()}
        groups = in_groups(sides, _SUMS_BYTES)
        count = sum(len(tokens) - 1 for tokens in encoded)
        matrices: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory(prefix="jdlora-moments-") as folder:
            for number, keys in enumerate(groups):
                sums = Sums()
                of_loss = {key: modules[name] for name, key in of_gradients.items() if key in keys}
                with (
                    watching({key: modules[key] for key in keys if key in modules}, sums.add),
                    differentiated(of_loss, sums.add),
                ):
                    steps = self._backward if of_loss else self._forward
                    for done, _ in enumerate(steps(encoded)):
                        if progress:
                            progress(_STAGE, number * len(encoded) + done, len(groups) * len(encoded))
                means = sums.means(count)
                # Of several groups each is put on disk, and read through a mapping that outlives the folder.
                matrices |= means if len(groups) == 1 else mapped(means, Path(folder) / f"{number}.safetensors")
        origin = Origin(self._base, text_sha256(text), len(text), count, max_tokens, self._dtype, adapter_sha256)
        return SecondMoments(origin, inputs, {key: matrices[key] for key in sides}, of_gradients)

    @contextmanager
    def adapted(self, adapter: Adapter) -> Iterator[None]:
        """The model with W x + B(A x) in the place of W x in the adapter's modules."""
        handles = []
        try:
            for name in adapter.slices:
                pair = adapter.factors(name)
                assert pair is not None
                b, a = (factor.to(self._device, DTYPES[self._dtype]) for factor in pair)
                handles.append(self._module(name).register_forward_hook(_adding(b, a)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            raise JDLoRAError(f"{self._base.name}: the base model has no module {name}") from None

    @torch.inference_mode()
    def _forward(self, texts: Sequence[Sequence[int]]) -> Iterator[None]:
        """A step for each text; one more value than texts."""
        yield
        for tokens in texts:
            # Without the output head: nobody reads the logits, and they are the largest tensor of all.
            self._model.base_model(input_ids=torch.tensor([list(tokens)], device=self._device), use_cache=False)
            yield

    def _backward(self, texts: Sequence[Sequence[int]]) -> Iterator[None]:
        """The same, forward and back from labels that the model itself draws."""
        draw = torch.Generator(self._device).manual_seed(_SEED)
        yield
        for tokens in texts:
            ids = torch.tensor([list(tokens)], device=self._device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
            drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=draw)[:, 0]
            torch.nn.functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()
            yield

    def _shared_inputs(
        self, slices: Sequence[SliceShape], modules: dict[str, nn.Module], tokens: Sequence[int]
    ) -> dict[str, str]:
        """Slice → the first slice that reads the very same tensor."""
        seen: dict[str, Tensor] = {}
        with watching(modules, seen.setdefault):
            list(self._forward([tokens[:2]]))
        first: dict[int, str] = {}
        inputs = {}
        for part in slices:
            if part.name not in seen:
                raise JDLoRAError(f"{self._base.name}: {part.name} took no part when the model ran")
            x = seen[part.name]
            if x.shape[-1] != part.d_in:
                raise JDLoRAError(
                    f"{self._base.name}: {part.name} has {x.shape[-1]} inputs, the adapters {part.d_in}: "
                    "they are for another base model"
                )
            inputs[part.name] = first.setdefault(id(x), part.name)  # all of `seen` is alive, so an id is one tensor
        return inputs


def _adding(b: Tensor, a: Tensor) -> Callable[..., Tensor]:
    def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (arguments[0] @ a.T) @ b.T

    return after


def _checked_folder(base_model: Path) -> Path:
    folder = Path(base_model)
    if not (folder / "config.json").is_file():
        raise JDLoRAError(f"{folder}: not a model's folder (no config.json)")
    return folder


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise JDLoRAError(f"calibration runs the base model with transformers ({error}): install it") from None
    # Its bars would break into the caller's.
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _tokenizer(folder: Path) -> Any:
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise JDLoRAError(f"{folder}: no tokenizer that transformers can load ({error})") from error

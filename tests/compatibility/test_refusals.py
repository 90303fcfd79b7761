"""What cannot be served with compression is refused at start-up by its flag's name, and the documentation says so."""

import re
from pathlib import Path

import pytest

from tests import tiny_models
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import engine_settings, touchpoints

pytest.importorskip("vllm")

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
TEXT = DOCUMENT.read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("refusals")
    model = tiny_models.write_model(root / "model", "llama")
    adapters = [read_adapter(tiny_models.write_adapter(root / f"a{i}", model, i)) for i in range(2)]
    return {"model": str(model), "collection": str(compress(adapters, root / "c", rank=8, clusters=1).path)}


@pytest.mark.parametrize("field", engine_settings._REFUSED)
def test_a_setting_that_does_not_fit_is_refused_by_its_flag_with_the_reason(files, field):
    from vllm.engine.arg_utils import EngineArgs

    options = EngineArgs(files["model"], additional_config={"jdlora": {"collection": files["collection"]}})
    setattr(options, field, 3 if field.startswith("max") else True)
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(JDLoRAError, match=f"{flag} cannot be used .*: {engine_settings._REFUSED[field]}"):
        engine_settings.apply_to_engine_args(options)
    assert f"`{flag}`" in TEXT


def test_the_documentation_names_the_verified_versions_and_tests_that_there_are():
    assert all(f"| {version} |" in TEXT for version in touchpoints.VERIFIED_VERSIONS)
    links = re.findall(r"\]\((\.\./[^)]+)\)", TEXT)
    assert links and all((DOCUMENT.parent / link).is_file() for link in links)
    linked = {Path(link).name for link in links}
    assert {file.name for file in Path(__file__).parent.glob("test_*.py")} <= linked

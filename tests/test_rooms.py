"""Who may import whom, and where the kernels live."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastgrpo"
# Everyone may import these; they import none of the rooms.
OPEN = {"types", "config", "conversation", "seeding", "ranks", "parcel", "data_files", "checksum"}
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "algorithms": {"kernels", "functions"},
    "data": set(),
    "functions": set(),
    "rewards": {"functions"},
    "environment": {"functions"},
    "sampler": {"kernels", "models"},
    "learner": {"kernels", "models", "algorithms"},
}
HEAVY = {"vllm": "sampler", "megatron": "learner"}


def imports_of(path):
    """Every module a file names, as dotted text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(room):
    folder = ROOT / "kernels" if room == "kernels" else PACKAGE / room
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room):
    assert files_of(room)
    allowed = MAY_IMPORT[room] | {room} | (OPEN if room != "kernels" else set())
    for path in files_of(room):
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("fastgrpo.")}
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_stay_in_their_room(package):
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != HEAVY[package]:
            assert not any(name.split(".")[0] == package for name in imports_of(path)), path


def test_kernels_import_torch_and_triton_only():
    third_party = {
        name.split(".")[0]
        for path in files_of("kernels")
        for name in imports_of(path)
        if name.split(".")[0] not in ("fastgrpo", "__future__")
    }
    import sys

    assert third_party - set(sys.stdlib_module_names) <= {"torch", "triton"}


def test_kernels_and_configuration_are_links_and_no_bare_package():
    """A package named `kernels` would shadow the one transformers looks for."""
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "conf").is_symlink()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or str(ROOT) not in found.origin

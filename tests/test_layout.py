"""The rules of the code base: files, and imports between rooms, imports in functions included."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from lora_jax.system.extras import EXTRAS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_jax"

# Room -> the rooms that it imports, which are all that it may. A room is a top-level module or a
# package; "" is the facade, `lora_jax/__init__.py`, which nothing in the package imports.
ARROWS: dict[str, set[str]] = {
    "base": set(),
    "errors": set(),
    "foreign": {"errors"},
    "paths": {"base", "errors"},
    "spec": {"errors"},
    "system": {"errors"},
    "__main__": {"errors", "system"},
    "frozen": {"base", "errors", "paths"},
    "updates": {"base", "errors", "spec"},
    "layout": {"base", "errors", "paths", "spec", "system", "updates"},
    "adapters": {"errors", "layout", "paths", "spec", "updates"},
    "bases": {"base", "errors", "layout", "paths", "updates"},
    "checkpoint": {"adapters", "base", "bases", "errors", "layout", "paths", "system"}
    | {"updates"},
    "models": {"base", "bases", "errors", "system"},
    "primitives": {"base", "bases", "errors", "paths", "updates"},
    "data": {"errors", "models", "system"},
    "resolve": {"errors", "layout", "paths", "primitives", "spec", "updates"},
    "sharding": {"base", "bases", "errors", "layout", "paths", "primitives", "spec"} | {"updates"},
    "transform": {"adapters", "bases", "errors", "layout", "paths", "primitives"}
    | {"spec", "updates"},
    "multi": {"adapters", "base", "errors", "layout", "primitives", "spec", "transform"}
    | {"updates"},
    "analysis": {"adapters", "base", "bases", "errors", "layout", "multi", "paths"}
    | {"primitives", "spec", "transform", "updates"},
    "serving": {"adapters", "analysis", "bases", "checkpoint", "data", "errors"}
    | {"layout", "models", "multi", "paths", "system", "transform"},
    "exchange": {"adapters", "analysis", "base", "bases", "checkpoint", "errors"}
    | {"layout", "models", "paths", "primitives", "resolve", "serving"}
    | {"multi", "spec", "system", "transform", "updates"},
    "training": {"adapters", "analysis", "base", "bases", "checkpoint", "data"}
    | {"errors", "frozen", "layout", "models", "multi", "paths", "primitives"}
    | {"resolve", "serving", "sharding", "spec", "system", "transform"}
    | {"updates"},
    "planner": {"adapters", "base", "bases", "data", "errors", "frozen", "paths"}
    | {"primitives", "sharding", "system", "training"},
    "sweeps": {"checkpoint", "errors", "frozen", "layout", "multi", "paths", "resolve"}
    | {"sharding", "spec", "system", "training", "transform", "updates"},
    "report": {"adapters", "analysis", "checkpoint", "errors", "layout", "serving"}
    | {"sweeps", "system", "training", "updates"},
    "cli": {"adapters", "base", "bases", "checkpoint", "data", "errors", "exchange"}
    | {"models", "paths", "planner", "primitives", "report", "resolve", "serving"}
    | {"spec", "sweeps", "system", "training"},
    "": {"adapters", "analysis", "bases", "checkpoint", "errors", "foreign", "frozen"}
    | {"layout", "multi", "paths", "resolve", "sharding", "spec", "transform"}
    | {"updates"},
}
# The rooms that are not part of the core.
AROUND = ("system", "models", "data", "training", "sweeps", "planner", "serving")
AROUND = (*AROUND, "exchange", "report", "cli", "__main__")
LONGEST_CORE, LONGEST = 12, 18  # modules in the longest import chain

# The packages that the core needs in addition to JAX and NumPy, and the rooms that import them.
CORE_LIBRARIES = {
    "flax": {"sharding", "foreign"},
    "optax": {"frozen"},
    "orbax": {"checkpoint"},
    "etils": {"checkpoint"},  # comes with Orbax
    "tensorstore": {"checkpoint"},  # comes with Orbax
}
ORBAX = {"lora_jax/checkpoint/storage.py"}  # Orbax still renames its API: one file follows it
CEILING = 400  # lines of a file

# Distribution -> the name that it is imported by, where the two differ.
IMPORT_NAMES = {
    "absl-py": "absl",
    "jax-cuda12-plugin": "jax_cuda12_plugin",
    "nvidia-cuda-nvcc-cu12": "nvidia",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
}


def sources(*folders: str) -> list[pathlib.Path]:
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if not any(part.startswith(".venv") for part in p.parts)]


EVERYWHERE = [
    *sources("lora_jax", "configs", "experiments", "benchmarks", "measuring", "tests"),
    ROOT / "train.py",
]


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: pathlib.Path) -> set[str]:
    """Full dotted names of all imports of the file; `from a import b` is `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def libraries(path: pathlib.Path) -> set[str]:
    ours = {"lora_jax", "configs", "train", "experiments", "benchmarks", "measuring", "tests"}
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - ours


def room(path: pathlib.Path) -> str:
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


def room_of(imported: str) -> str:
    """The room that holds `lora_jax.x.y`; the facade, if x is not a room."""
    first = [*imported.split("."), ""][1]
    return first if first in ARROWS else ""


def rooms_imported(path: pathlib.Path) -> set[str]:
    ours = {name for name in imports(path) if name.split(".")[0] == "lora_jax"}
    return {room_of(name) for name in ours} - {room(path)}


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in sources("lora_jax")} == set(ARROWS)


@pytest.mark.parametrize("name", ARROWS)
def test_arrows(name: str) -> None:
    files = [path for path in sources("lora_jax") if room(path) == name]
    assert set().union(*map(rooms_imported, files)) == ARROWS[name]


def test_nothing_in_the_package_imports_the_facade() -> None:
    assert not [name for name, targets in ARROWS.items() if "" in targets]


# Folder -> the other folders of a checkout that it may import in addition to `lora_jax`.
CHECKOUT: dict[str, set[str]] = {
    "lora_jax": set(),
    "configs": set(),
    "measuring": set(),
    "benchmarks": {"measuring", "configs", "train"},
    "experiments": {"measuring", "configs"},
}


@pytest.mark.parametrize("folder", CHECKOUT)
def test_folders_of_a_checkout(folder: str) -> None:
    """Folders of a checkout import one another only as the table allows."""
    known = {"configs", "train", "experiments", "benchmarks", "measuring", "tests"}
    for path in sources(folder):
        others = {name.split(".")[0] for name in imports(path)} & known
        assert others <= CHECKOUT[folder] | {folder}, name_of(path)


def chains() -> dict[str, list[str]]:
    """Module -> the longest chain that begins with it, in which each module imports the next."""
    modules = {
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path
        for path in sources("lora_jax")
    }

    def module_of(imported: str) -> str:
        while imported not in modules:
            imported = imported.rpartition(".")[0]
        return imported

    graph = {
        name: {module_of(x) for x in imports(path) if x.split(".")[0] == "lora_jax"} - {name}
        for name, path in modules.items()
    }
    found: dict[str, list[str]] = {}

    def longest(name: str, above: tuple[str, ...] = ()) -> list[str]:
        assert name not in above, f"a cycle: {' -> '.join((*above, name))}"
        if name not in found:
            below = [longest(other, (*above, name)) for other in graph[name]]
            found[name] = [name, *max(below, key=len, default=[])]
        return found[name]

    return {name: longest(name) for name in modules}


def test_import_chains_are_short() -> None:
    every = chains()
    core = {n: c for n, c in every.items() if (n.split(".") + [""])[1] not in AROUND}
    for limit, among in ((LONGEST_CORE, core), (LONGEST, every)):
        worst = max(among.values(), key=len)
        assert len(worst) <= limit, "\n".join(worst)


def test_arrows_have_no_cycle() -> None:
    left = dict(ARROWS)
    while left:
        leaves = {name for name, targets in left.items() if not targets & set(left)}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in leaves}


def test_core_needs_little() -> None:
    core = [path for path in sources("lora_jax") if room(path) not in AROUND]
    for path in core:
        for library in libraries(path) - {"jax", "numpy"}:
            assert room(path) in CORE_LIBRARIES.get(library, set()), f"{name_of(path)}: {library}"


def test_orbax_in_one_file() -> None:
    importing = {name_of(p) for p in sources("lora_jax") if "orbax" in libraries(p)}
    assert importing == ORBAX


def test_imported_libraries_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]}
    for extra in EXTRAS:
        lines = project["optional-dependencies"][extra]
        declared |= {re.split(r"[<>=\[; ]", line)[0] for line in lines}
    known = {IMPORT_NAMES.get(name, name) for name in declared}
    used = set().union(*map(libraries, [*sources("lora_jax", "configs"), ROOT / "train.py"]))
    assert used - {"etils", "tensorstore"} <= known


def test_five_libraries_are_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]}
    assert required == {"flax", "jax", "numpy", "optax", "orbax-checkpoint"}
    for extra, modules in EXTRAS.items():
        lines = project["optional-dependencies"][extra]
        installed = {re.split(r"[<>=\[; ]", line)[0] for line in lines}
        assert set(modules) <= {IMPORT_NAMES.get(name, name) for name in installed}


def test_importing_it_loads_only_what_jax_and_numpy_load() -> None:
    """Importing lora_jax loads no library that JAX and NumPy do not load."""
    program = (
        "import sys, jax, numpy, jax.numpy, jax.experimental\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import lora_jax\n"
        "after = {name.split('.')[0] for name in sys.modules} - before\n"
        "print(sorted(after - set(sys.stdlib_module_names) - {'lora_jax'}))\n"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_public_jax_only() -> None:
    assert not [name_of(path) for path in EVERYWHERE if "jax." + "_src" in path.read_text()]


def test_no_tensorflow_and_no_backend_at_import() -> None:
    """Importing all modules loads no other framework and starts no backend."""
    modules = [
        name_of(p).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for p in sources("lora_jax")
    ]
    program = (
        f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
        "bad = [m for m in ('tensorflow', 'torch', 'transformers') if m in sys.modules]\n"
        "assert not bad, bad\n"
        "import jax\njax.config.update('jax_num_cpu_devices', 3)  # raises once a backend is up\n"
        "assert len(jax.devices('cpu')) == 3\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_manners() -> None:
    texts = {name_of(path): path.read_text() for path in sources("lora_jax")}
    assert not {
        n: len(text.splitlines()) for n, text in texts.items() if text.count("\n") > CEILING
    }
    assert not [name for name, text in texts.items() if re.search(r"\bhasattr\(", text)]


# Names that several modules may define, and the reason.
SHARED_NAMES = {"Tree": "`Tree = Any`: what every module calls a pytree"}


def defined_types(path: pathlib.Path) -> set[str]:
    """Public classes of the file, and names that it gives to types (`Line = dict[str, Any]`)."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.add(node.targets[0].id)
    return {n for n in found if re.fullmatch(r"[A-Z]\w*[a-z]\w*", n)} - set(SHARED_NAMES)


def test_one_type_for_each_name() -> None:
    where: dict[str, list[str]] = {}
    for path in sources("lora_jax"):
        for name in defined_types(path):
            where.setdefault(name, []).append(name_of(path))
    twice = [f"{name}: {', '.join(found)}" for name, found in where.items() if len(found) > 1]
    assert not twice, "\n".join(sorted(twice))


def test_primitives_are_named_in_one_room() -> None:
    from lora_jax.primitives import table

    names = {name for name in table.PRIMITIVES if "_" in name} | {"gather"}
    found = []
    for path in sources("lora_jax"):
        if path.parent.name == "primitives":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            texts = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            named = isinstance(node, ast.Compare) and any(text in names for text in texts)
            asked = isinstance(node, ast.Attribute) and node.attr == "primitive"
            if named or asked:
                found.append(f"{name_of(path)}:{node.lineno}")
    assert not found

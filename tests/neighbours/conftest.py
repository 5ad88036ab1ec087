"""Makes transformers' common model tests importable, and imports the package under test before any class is looked up.

tests/test_neighbours.py runs it in a process of its own, with the tests of transformers' source distribution on the
path.
"""

import importlib
import os
import sys
import types
import warnings

warnings.filterwarnings("ignore")

# modules that a source distribution leaves out; the first two hold further tests, the last one downloads files
ABSENT = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": str},
}

for name, content in ABSENT.items():
    package, _, _ = name.rpartition(".")
    if package and package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

importlib.import_module(os.environ["IMPORTED_FIRST"])

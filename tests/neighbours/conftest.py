"""Makes the common model tests of transformers importable, and imports the package under test before all others.

tests/test_neighbours.py runs pytest on this folder in a separate process, with the tests from transformers' source
distribution on the path.
"""

import importlib
import os
import sys
import types
import warnings

warnings.filterwarnings("ignore")

# replacements for modules that the source distribution does not contain: further tests, and a download of files
MISSING_MODULES = {
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": str},
}

for name, content in MISSING_MODULES.items():
    package, _, _ = name.rpartition(".")
    if package and package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)

importlib.import_module(os.environ["IMPORTED_FIRST"])

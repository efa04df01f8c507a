import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location(
    "licences", Path(__file__).resolve().parents[1] / "tools" / "licences.py"
)
assert SPEC is not None
assert SPEC.loader is not None
licences = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(licences)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", "allowed"),
        ("Apache-2.0 OR BSD-2-Clause", "allowed"),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "allowed"),
        ("License :: OSI Approved :: Python Software Foundation License", "allowed"),
        ("LGPL-2.1-or-later", "allowed"),
        ("GNU Lesser General Public License v3 (LGPLv3)", "allowed"),
        ("BSD-3-Clause AND GPL-3.0-or-later WITH GCC-exception-3.1", "allowed"),
        ("MIT OR GPL-2.0-only", "allowed"),
        ("GPL-3.0-or-later", "forbidden"),
        ("AGPL-3.0", "forbidden"),
        ("GPLv2", "forbidden"),
        ("MIT AND GPL-2.0-only", "forbidden"),
        ("License :: OSI Approved :: GNU Affero General Public License v3", "forbidden"),
        ("GNU General Public License v2 (GPLv2)", "forbidden"),
        ("Proprietary", "unknown"),
        ("", "unknown"),
    ],
)
def test_verdicts(licence, expected):
    assert licences.verdict(licence) == expected


def test_the_walk_reaches_extras_and_what_they_need():
    reached = {
        name.lower().replace("_", "-") for name, _ in licences.needed("omniconv", frozenset({"export"}))
    }
    assert {"omniconv", "torch", "numpy", "onnx", "onnxscript", "sympy", "protobuf"} <= reached
    assert "fastapi" not in reached
    assert len(reached) == len(list(licences.needed("omniconv", frozenset({"export"}))))


def test_a_gpl_package_in_the_tree_fails(monkeypatch, capsys):
    stated = licences.stated
    monkeypatch.setattr(
        licences, "stated", lambda package: ["GPL-3.0"] if package["Name"] == "sympy" else stated(package)
    )
    assert licences.main() == 1
    out = capsys.readouterr().out
    assert out.startswith("sympy (needed by ")
    assert out.endswith(") is under GPL-3.0; take another package\n")

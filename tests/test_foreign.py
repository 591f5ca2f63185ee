"""The command that runs MLX's own tests, on tests that pass, fail, crash and hang."""

from __future__ import annotations

import textwrap

import pytest

from tests import foreign

TINY = """
import os, time, unittest
import mlx.core as mx

INSIDE = type(mx).__name__ != "module"

class TestTiny(unittest.TestCase):
    def test_a_passes(self):
        self.assertEqual(mx.grad(lambda x: x * x)(mx.array(2.0)).item(), 4.0)

    def test_b_fails_inside(self):
        for n in range(2):
            with self.subTest(n=n):
                self.assertFalse(INSIDE and n == 1, "it is inside")

    def test_c_crashes_inside(self):
        if INSIDE:
            os._exit(3)

    def test_d_hangs_natively(self):
        if not INSIDE:
            time.sleep(60)

    @unittest.skip("for a reason")
    def test_e_skipped(self):
        pass

    def test_f_refused_natively(self):
        with self.assertRaises(ValueError):
            if type(mx).__name__ == "module":
                raise ValueError

    def test_g_speaks_to_the_output(self):
        print("not for the parent", flush=True)


class TestBroken(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise RuntimeError("never")

    def test_it(self):
        pass
"""


@pytest.fixture
def checkout(tmp_path):
    tests = tmp_path / "python" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_tiny.py").write_text(textwrap.dedent(TINY))
    return tmp_path


def test_each_outcome_is_told(checkout, capsys, monkeypatch):
    assert foreign.main([str(checkout), "test_tiny.py", "--limit", "5"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in said[2].strip("|").split("|")] == [
        "test_tiny.py",
        *("5", "1", "1", "1"),
        *("3", "3", "1", "1"),
    ]
    assert "3 pass natively and not inside patched():" in said
    told = [line.strip() for line in said[-3:]]
    assert told == [
        "test_tiny.TestTiny.test_b_fails_inside failed: AssertionError: True is not false : "
        "it is inside",
        "test_tiny.TestTiny.test_c_crashes_inside crashed: exit status 3",
        "test_tiny.TestTiny.test_f_refused_natively failed: AssertionError: ValueError not raised",
    ]


def test_a_folder_of_tests_where_none_is_worse(checkout, capsys):
    file = checkout / "python" / "tests" / "test_tiny.py"
    file.write_text(TINY.split("    def test_b")[0])
    assert foreign.main([str(file.parent), "test_tiny.py"]) == 0
    assert capsys.readouterr().out.endswith("0 pass natively and not inside patched().\n")


@pytest.mark.parametrize("also", ["True", "False"])
def test_a_refusal_that_is_lifted_is_not_insisted_on(also, checkout, capsys):
    body = TINY[TINY.index("    def test_f") : TINY.index("    def test_g")]
    body = body.replace("test_f_refused_natively", "test_vmap_pad")
    (checkout / "python" / "tests" / "test_vmap.py").write_text(
        "import unittest\nimport mlx.core as mx\n\nclass TestVmap(unittest.TestCase):\n"
        f"{body}        self.assertTrue({also} or type(mx).__name__ == 'module')\n"
    )
    assert foreign.main([str(checkout), "test_vmap.py"]) == (0 if also == "True" else 1)
    assert "test_vmap_pad is let do without its refusal" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "test_no_such.py"]])
def test_no_checkout(arguments, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    with pytest.raises(SystemExit) as done:
        foreign.main(arguments)
    assert done.value.code == 2
    assert "test_" in capsys.readouterr().err

"""The two parts are disjoint, repeatable, complete, and plain English."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.unified_sr.general_text import detokenise, load_general_text


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def test_default_text_is_long_disjoint_prose() -> None:
    fit, held_out = load_general_text()
    assert len(fit) > 60_000
    assert 0.4 < len(held_out) / len(fit) < 0.6
    assert not set(_paragraphs(fit)) & set(_paragraphs(held_out))
    everything = fit + "\n\n" + held_out
    for markup in ("***", "===", "---", "::=", ">>>"):
        assert markup not in everything.replace('"**"', "")
    assert all(paragraph[0].strip() and len(paragraph.split()) >= 8 for paragraph in _paragraphs(everything))
    letters = sum(letter.isalpha() or letter == " " for letter in everything)
    assert letters > 0.9 * len(everything)


def test_default_text_does_not_depend_on_the_process() -> None:
    program = (
        "from examples.unified_sr.general_text import load_general_text as f; import hashlib; "
        "print(hashlib.sha256(repr(f()).encode()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[2]
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={"PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(seen) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(20, 60), min_size=20, max_size=60),
    separator=st.sampled_from(["\n\n", "\n \n", "\n", " "]),
)
def test_a_file_is_parted_without_loss_or_overlap(tmp_path: Path, lengths: list[int], separator: str) -> None:
    paragraphs = [f"Here stands {'word ' * length}number {number}." for number, length in enumerate(lengths)]
    path = tmp_path / "text.txt"
    path.write_text(separator.join(paragraphs + paragraphs[:3]), encoding="utf-8")
    fit, held_out = load_general_text(path)
    assert load_general_text(str(path)) == (fit, held_out)
    first, second = _paragraphs(fit), _paragraphs(held_out)
    assert sorted(first + second) == sorted(paragraphs), "each paragraph is in exactly one part, exactly once"
    assert len(held_out) > 0.2 * len(fit)


@pytest.mark.parametrize(
    ("tokenised", "plain"),
    [
        ("a well @-@ known man , aged 30 .", "a well-known man, aged 30."),
        ("1 @,@ 500 m ( 3 @.@ 2 mi ) away", "1,500 m (3.2 mi) away"),
        ('He said " no way " and left ; she did n\'t .', 'He said "no way" and left; she didn\'t.'),
        ("It 's the dogs ' house : a house !", "It's the dogs' house: a house!"),
        ("It rains . The <unk> is wet . It stops .", "It rains. It stops."),
        ('He said " all is <unk> . It is late . " Then he left .', "It is late. Then he left."),
        ("Nothing to undo here.", "Nothing to undo here."),
    ],
)
def test_detokenise(tokenised: str, plain: str) -> None:
    assert detokenise(tokenised) == plain


def test_tokenised_files_are_detected_and_headings_dropped(tmp_path: Path) -> None:
    lines = [" ", " = A town = ", " "]
    for number in range(60):
        lines += [
            f" = = Part {number} = = ",
            f" House {number} , a well @-@ kept one , is <unk> . It has {number} doors .",
        ]
    (tmp_path / "wiki.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="after cleaning"):
        load_general_text(tmp_path / "wiki.txt")  # the sentences that stay are too few
    longer = [line.replace("It has", "It is old and stands by the long river and it has") for line in lines]
    (tmp_path / "wiki.txt").write_text("\n".join(longer))
    everything = "\n\n".join(load_general_text(tmp_path / "wiki.txt"))
    assert sorted(_paragraphs(everything)) == sorted(
        f"It is old and stands by the long river and it has {number} doors." for number in range(60)
    )


def test_untokenised_punctuation_is_left_alone(tmp_path: Path) -> None:
    body = "\n\n".join(
        f"Line {number} : a ' quoted ' word , spaced out on purpose and kept as it is ." for number in range(60)
    )
    (tmp_path / "text.txt").write_text(body)
    assert set(_paragraphs("\n\n".join(load_general_text(tmp_path / "text.txt")))) == set(_paragraphs(body))


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_general_text(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError):
        load_general_text(tmp_path)
    (tmp_path / "short.txt").write_text("A short text.")
    with pytest.raises(ValueError, match=r"short\.txt holds 13 characters"):
        load_general_text(tmp_path / "short.txt")
    (tmp_path / "copies.txt").write_text("The same line again and again.\n\n" * 500)
    with pytest.raises(ValueError, match="after cleaning"):
        load_general_text(tmp_path / "copies.txt")
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 999)
    with pytest.raises(ValueError, match="not UTF-8"):
        load_general_text(tmp_path / "latin.txt")

"""Result files: which sources they are of, and what several of them say together."""

from peft_kernels.benchmarks import results


def case(op, *providers, ms=1.0, **absent):
    rows = [{"provider": name, "ms": ms} for name in providers]
    return {"op": op, "M": 8, "title": op, "rates": None, "results": rows, "absent": absent}


def written(folder, name, date, **given):
    run = {"kind": "gpu", "device": "H100", "date": date, "sources": name[0], "cases": []} | given
    results.save(run, folder / f"{name}.json")


def test_a_hash_of_every_source_whatever_the_place(tmp_path):
    """A wheel has triton_kernels inside of peft_kernels, and no csrc."""

    def tree(name, kernels):
        folders = {"peft_kernels": tmp_path / name / "peft_kernels", "triton_kernels": tmp_path / name / kernels}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "a.py").write_text(f"text of {folder.name}")
            (folder / "a.so").write_text(name)  # built, not written
        return folders

    checkout, wheel = tree("checkout", "triton_kernels"), tree("wheel", "peft_kernels/triton_kernels")
    before = results.sources(checkout)
    assert before == results.sources(wheel) == results.sources(checkout) and len(before) == 12
    (wheel["triton_kernels"] / "a.py").write_text("another text")
    (checkout["peft_kernels"] / "a.py").rename(checkout["peft_kernels"] / "b.py")
    assert len({before, results.sources(wheel), results.sources(checkout)}) == 3


def test_every_source_that_decides_a_result_is_in_it():
    assert {path.name for path in results.FOLDERS.values()} == {"peft_kernels", "triton_kernels", "benchmarks", "csrc"}
    assert all(any(folder.rglob("*")) for folder in results.FOLDERS.values())


def test_a_case_of_two_processes_is_one():
    cases = [case("a", "PEFT", "triton", cuda="absent: not yet")]
    results.join(cases, case("b", "PEFT"))
    results.join(cases, case("a", "cuda", "triton", ms=2.0))
    results.join(cases, case("a", PEFT="wrong: y"))
    assert [each["op"] for each in cases] == ["a", "b"]
    assert [(row["provider"], row["ms"]) for row in cases[0]["results"]] == [("cuda", 2.0), ("triton", 2.0)]
    assert cases[0]["absent"] == {"PEFT": "wrong: y"}


def test_files_of_one_device_are_read_together(tmp_path):
    """What a later one has not is an earlier one's; cases of the same sources are put together, others are not."""
    written(tmp_path, "a-speed", "2026-01-02", cases=[case("x", "PEFT", "cuda"), case("y", "PEFT")], steps=["old"])
    written(tmp_path, "a-tuning", "2026-01-02", cases=[case("x", "PEFT", "compiled", ms=2.0)])
    written(tmp_path, "b-truth", "2026-01-03", numerics=["new"])
    written(tmp_path, "c-speed", "2026-01-01", cases=[case("z", "PEFT")], numerics=["old"], steps=["older"])
    truth, tuning, speed = sorted(results.load(tmp_path), key=lambda run: run["date"], reverse=True)
    assert truth["numerics"] == ["new"] and not truth["cases"]
    rows = [(each["op"], [(row["provider"], row["ms"]) for row in each["results"]]) for each in tuning["cases"]]
    assert rows == [("x", [("cuda", 1.0), ("PEFT", 2.0), ("compiled", 2.0)]), ("y", [("PEFT", 1.0)])]
    assert speed["steps"] == ["old"] and not speed["cases"]

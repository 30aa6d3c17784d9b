"""The texts in the page: answers before and after, and generated pairs."""

import json

from sdpo_kernels.stepwise.report.run_report import write_report
from tests.stepwise.report.folders import all_lines, stage, write_run


def write_lines(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def page(folder):
    write_report(folder)
    return (folder / "report.html").read_text()


def test_answers_are_shown_by_prompt_from_the_initial_model_on(tmp_path):
    write_run(tmp_path, [stage(1, "easy")], all_lines(1))
    assert "Answers before and after" not in page(tmp_path)
    rows = [{"prompt": "Why <b>?", "answer": "who knows", "ended": False}, {"prompt": "How?", "answer": "so"}]
    write_lines(tmp_path / "samples.jsonl", *rows)
    write_lines(tmp_path / "stage-1-easy" / "samples.jsonl", {**rows[0], "answer": "because", "ended": True}, "broken")
    text = page(tmp_path)
    order = ["Why &lt;b&gt;?", "M₀ (start)", "who knows …", "M₁ (easy)", "because<", "How?", "so<"]
    places = [text.index(part, text.index("Answers before and after</h2>")) for part in order]
    assert places == sorted(places)


def test_generated_pairs_are_shown_and_long_ones_cut(tmp_path):
    write_run(tmp_path, [stage(1, "easy", prompts=9), stage(2, "hard")], all_lines(1))
    pair = {"prompt": "p", "chosen": "yes", "rejected": "n" * 2000}
    for name in ("stage-1-easy", "stage-2-hard"):
        write_lines(tmp_path / name / "pairs.jsonl", {"prompt": "no answers"}, pair)
    text = page(tmp_path)
    assert text.count("<dt>chosen</dt><dd>yes</dd>") == 1, "stage 2 has no prompts: that file is not its pairs"
    assert "n" * 600 + " …" in text
    assert "n" * 601 not in text

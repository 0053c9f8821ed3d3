"""With which prompts the answers of a task are exchanged."""

from tuneline.evaluate.prompt_control import exchange


def test_answers_get_the_prompt_of_a_row_with_another_answer() -> None:
    documents = [
        {"prompt": f"prompt {number}", "target": target}
        for number, target in enumerate(["yes", "no", "yes", "no"])
    ]
    assert [prompt for _, prompt in exchange(documents)] == [
        "prompt 3",
        "prompt 0",
        "prompt 1",
        "prompt 2",
    ]
    assert exchange([{"prompt": "", "target": "a"}, {"prompt": "", "target": "b"}]) == []

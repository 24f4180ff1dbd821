"""``glassformer chat``: what is said, taken back, said otherwise, and why."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import glassformer as gf
import warm
from glassformer.cli import app as cli
from glassformer.cli.talk import Answer, Exchange, Talk
from glassformer.cli.terminal import COMMANDS, Terminal
from glassformer.core.errors import InputError, SamplerError
from web import serving


def talk(template: str | None = serving.TEMPLATE, **how: Any) -> Talk:
    settings = how.pop("settings", {"temperature": 0.0})
    return Talk(serving.loaded(template), settings, **{"max_new_tokens": 6, "capacity": 256} | how)


def texts(tokens: Any) -> str:
    return "".join(t.text for t in tokens)


def typed(*lines: str, made: Talk | None = None) -> tuple[str, Talk]:
    """What the terminal shows when these lines are typed."""
    made = made or talk()
    out = io.StringIO()
    Terminal(made, console=Console(file=out, width=110, highlight=False), lines=lines).run()
    return out.getvalue(), made


# The conversation


def test_each_answer_is_that_of_generate_on_the_whole_conversation() -> None:
    what, made = serving.loaded(), talk(system="Be brief.")
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    for said in ("Hello", "And you?", "Why?"):
        messages.append({"role": "user", "content": said})
        want = gf.generate(what.model, what.chat(messages), tokenizer=what.tokenizer, max_new_tokens=6).text
        assert texts(made.say(said)) == want
        messages.append({"role": "assistant", "content": want})
    assert made.messages() == messages
    assert made.engine.stats().prefix_tokens > 20


def test_without_a_template_it_goes_on_with_a_transcript() -> None:
    what, made = serving.loaded(None), talk(None)
    answer = texts(made.say("Hello"))
    want = gf.generate(what.model, "User: Hello\nAssistant:", tokenizer=what.tokenizer, max_new_tokens=6).text
    assert answer == want
    texts(made.say("More"))
    assert what.tokenizer.decode(made.ids()) == f"User: Hello\nAssistant: {want.strip()}\nUser: More\nAssistant:"


def test_back_is_as_if_it_had_never_been_said() -> None:
    made, other = talk(settings={"temperature": 0.8, "top_k": 40}, seed=3), talk(settings={"temperature": 0.8, "top_k": 40}, seed=3)
    texts(made.say("Hello"))
    texts(made.say("Forget this"))
    made.back()
    texts(other.say("Hello"))
    assert texts(made.say("Go on")) == texts(other.say("Go on"))


def test_branches_are_other_answers_and_the_chosen_one_counts() -> None:
    made = talk(settings={"temperature": 1.0}, seed=3)
    first, second = texts(made.say("Hello")), texts(made.again())
    assert first != second
    assert made.messages()[-1]["content"] == second
    made.choose(1)
    assert made.messages()[-1]["content"] == first
    assert (texts(made.say("x")), texts(made.again())) == tuple(a.text for a in made.last.answers)
    with pytest.raises(InputError, match="has 2 answers, so there is no number 5: /branch alone makes another"):
        made.choose(5)


def test_why_is_the_trace_of_that_token() -> None:
    made = talk(settings={"temperature": 0.7, "top_k": 12}, seed=1)
    tokens = list(made.say("Hello"))
    assert made.why().id == tokens[-1].id
    assert made.why(3).id == tokens[-3].id
    assert [s.name for s in made.why().stages] == ["model", "Temperature", "TopK", "Draw"]
    with pytest.raises(InputError, match="has 6 tokens, so none is the 9-th last: /why takes a number from 1 to 6"):
        made.why(9)


def test_settings_are_checked_before_they_hold() -> None:
    made = talk()
    made.set("top-k", 5)
    made.set("temperature", 0.5)
    assert made.chain.startswith("Temperature(t=0.5) | TopK(k=5) | Draw(")
    for name, value, says in (("temprature", 1, "Did you mean 'temperature'"), ("top_p", 0, "top-p is a probability above 0"), ("seed", "x", "whole number")):
        with pytest.raises(SamplerError, match=says):
            made.set(name, value)
    assert made.settings == {"temperature": 0.5, "top_k": 5}
    made.set("top_k", None)
    made.set("max_new_tokens", 2)
    assert made.settings == {"temperature": 0.5}
    assert len(list(made.say("x"))) == 2


def test_a_conversation_that_does_not_fit_says_so_and_forgets_the_message() -> None:
    made = talk(capacity=24)
    with pytest.raises(InputError, match=r"The conversation has \d+ tokens, and 24 are held: take some of it /back"):
        texts(made.say("word " * 100))
    assert made.exchanges == []
    assert texts(made.say("Hi"))


def test_an_answer_that_is_left_lets_go_of_the_engine() -> None:
    made = talk(max_new_tokens=100)
    answer = made.say("Hello")
    got = [next(answer).text for _ in range(3)]
    answer.close()
    assert made.last.answer.text == "".join(got)
    assert made.engine.stats().running == 0
    assert texts(made.again())


# The terminal


def test_a_session_at_the_terminal() -> None:
    shown, made = typed("Hello", "/why 2", "/set temperature 0.5", "/branch", "/branch 1", "/show", "/help", "//slash", "/back", "/quit", "never")
    assert len(made.exchanges) == 1
    assert "Decoder" in shown.splitlines()[0]
    assert made.last.answers[0].text.strip()[:8] in shown
    assert "by the model" in shown
    assert "Temperature(t=0.5)" in shown
    assert "/branch N goes on from answer N." in shown
    assert "tokens lay in the cache already" in shown
    assert "taken back: /slash" in shown
    assert all(name in shown for name in COMMANDS)
    assert "never" not in shown


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/sett x 1", "There is no command /sett. Did you mean '/set'"),
        ("/back", "Nothing was said yet: write a message first."),
        ("/why", "Nothing was said yet"),
        ("/why me", "/why takes a number from 1 on, but 'me' was given."),
        ("/back 2", "/back takes nothing, but '2' was given."),
        ("/set", "/set takes a name and a value"),
        ("/set nonsense", "/set takes a name and a value"),
        ("/set top_p 0", "top-p is a probability above 0"),
        ("/save", "/save takes a file"),
        ("/save talk.exe", "'talk.exe' ends in '.exe', but the ending says how"),
        ("/save /nowhere/at/all.md", "cannot be written"),
    ],
)
def test_a_mistake_is_a_sentence_and_the_talk_goes_on(line: str, says: str) -> None:
    shown, made = typed(line, "Hello")
    assert says in " ".join(shown.split())
    assert len(made.exchanges) == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    made = talk(max_new_tokens=50)
    real = Talk.say

    def interrupted(self: Talk, message: str) -> Any:
        for i, token in enumerate(real(self, message)):
            if i == 3 and message == "Hello":
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Talk, "say", interrupted)
    shown, _ = typed("Hello", "Again", made=made)
    assert "(stopped)" in shown
    assert len(made.exchanges) == 2
    assert len(made.exchanges[0].answer.choices) == 4


def test_what_a_model_writes_does_not_rule_the_terminal() -> None:
    out = io.StringIO()
    terminal = Terminal(talk(), console=Console(file=out, force_terminal=True, width=80))
    terminal._out("a\x1b[2Jb [bold]c[/]\n")
    terminal.talk.exchanges.append(Exchange("x", [Answer("a\x1b[2Jb\x07")]))
    terminal.line("/branch 1")
    terminal.line("/branch")
    assert "\x1b[2J" not in out.getvalue()
    assert "\x07" not in out.getvalue()
    assert "[bold]c[/]" in out.getvalue()


@pytest.mark.parametrize("ending", ["json", "md", "txt"])
def test_a_conversation_is_saved(tmp_path: Path, ending: str) -> None:
    made = talk(system="Be brief.")
    answer = texts(made.say("Hello"))
    text = made.save(str(tmp_path / f"talk.{ending}")).read_text()
    if ending == "json":
        assert json.loads(text)["messages"] == made.messages()
        assert json.loads(text)["exchanges"] == [{"message": "Hello", "answers": [answer], "chosen": 0}]
    assert "Be brief." in text
    assert "Hello" in text


def test_lines_through_a_pipe_are_answered_one_by_one(tmp_path: Path) -> None:
    what = serving.loaded()
    folder = gf.save(what.model, tmp_path / "small", what.tokenizer)
    lines = b"Hello\n/set max_new_tokens 3\nMore\n/nothing\n"
    program = warm.Program(["-m", "glassformer", "chat", str(folder), "-n", "5", "-t", "0", "--device", "cpu"], stdin=lines)
    out, err = program.communicate(120)
    made = talk(max_new_tokens=5)
    first = texts(made.say("Hello"))
    made.set("max_new_tokens", 3)
    assert out == f"{first}\n{texts(made.say('More'))}\n"
    assert err == "error: There is no command /nothing. /help lists them; a message that begins with / is written with two.\n"
    assert program.returncode == 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gf.save(serving.loaded().model, tmp_path / "mute")
    assert cli.main(["chat", str(tmp_path / "mute")]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err

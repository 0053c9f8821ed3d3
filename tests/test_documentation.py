"""Every command, file, recipe key and link of the pages, held against the real thing.

Commands of `tuneline` are parsed by the command line itself, and those that need no cluster and no
minute are run. A word in capitals, such as RUN, stands for a value of the reader's; a file name
does so only if PLACEHOLDERS says what it stands for.
"""

import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command
from typer.testing import CliRunner

from tuneline.errors import RecipeError
from tuneline.pipelines.catalog import RECIPES_DIR, find_recipe
from tuneline.pipelines.cli.main import app
from tuneline.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "manifests/README.md", ROOT / "images/README.md"),
]
CLI: Any = get_command(app)
RECIPE_NAMES = {path.stem for path in RECIPES_DIR.glob("*.yaml")}

PLACEHOLDERS = {
    **dict.fromkeys(("recipe.yaml", "recipe.schema.json"), "the README's recipe"),
    **dict.fromkeys(("support-bot.pipeline.yaml", "pipeline.yaml"), "what `compile` writes"),
    **dict.fromkeys(("mine.csv", "mine.yaml"), "rows and recipe of the README"),
    **dict.fromkeys(("answers.csv", "answers.yaml", "other.csv", "qwen.yaml"), "the tutorials'"),
    **dict.fromkeys(("support-h100.yaml", "support-h100.pipeline.yaml"), "tutorial-cluster.md"),
    "serving/merged.yaml": "in a published repository",
}
"""Files that a reader has and the repository does not, and what they stand for."""
RUN_HERE = {"recipes", "schema", "compile", "lint", "plan"}
"""Commands that are run: they take seconds and need no cluster."""
OPERATORS = {"|", "||", "&&", ";", "&", ">", ">>", "(", ")", "do", "done", "then", "fi"}


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block, as the shell splits it."""

    block: Block
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block}: {shlex.join(self.words)}"


@functools.cache
def tokens_of(page: Path) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(page, token.map[0] + 1, token.content)
        for token in tokens_of(page)
        if token.type in ("fence", "code_block")
    ]


def expanded(page: Path, word: str) -> list[str]:
    """Return the words of a shell variable that the page sets; any other word as it is."""
    if not re.fullmatch(r"\$[A-Z]+", word):
        return [word]
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(rf"""^ *(?:export )?{word[1:]}=(["'])(.*?)\1""", text, re.M)
    return shlex.split(found[2]) if found else [word]


def split(block: Block, text: str) -> list[Command]:
    """Split shell text into commands; text that is no shell has none of ours."""
    commands: list[Command] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();&|>")
        lexer.whitespace_split = True
        lexer.commenters = "#" if re.search(r"(^|\s)#", line) else ""
        try:
            words = list(lexer)
        except ValueError:
            continue
        part: list[str] = []
        if words[:2] == ["unshare", "-n"]:
            words = words[2:]
        words = [part for word in words for part in expanded(block.page, word)]
        for word in [*words, ";"]:
            if word in OPERATORS:
                commands += [Command(block, tuple(part))] if part else []
                part = []
            elif part or not re.fullmatch(r"[A-Za-z_]+=.*", word):
                part.append(word)
    return commands


ALL_BLOCKS = [block for page in PAGES for block in blocks_of(page)]
ALL_COMMANDS = [command for block in ALL_BLOCKS for command in split(block, block.text)]


def inline_commands() -> list[Command]:
    """Return the commands in running text that are more than the name of a command."""
    found = []
    for page in PAGES:
        for token in tokens_of(page):
            for child in token.children or ():
                text = " ".join(child.content.split())
                if child.type == "code_inline" and re.match(r"(tuneline|make) \S", text):
                    found += split(Block(page, (token.map or [0])[0] + 1, text), text)
    return found


def of(*names: str) -> list[Command]:
    return [command for command in ALL_COMMANDS if command.words[0].split("/")[-1] in names]


def is_placeholder(word: str) -> bool:
    """Return whether a word stands for a value of the reader's."""
    return word in PLACEHOLDERS or re.search(r"\.\.\.|\$|[A-Z]{3}", word) is not None


def check_file(command: Command, word: str) -> None:
    assert is_placeholder(word) or (ROOT / word).exists(), (
        f"{command}: there is no {word}; correct it, or explain it in PLACEHOLDERS"
    )


def check_set(command: Command, setting: str) -> None:
    """Check KEY=VALUE; a value that is a placeholder has only its key checked."""
    key, _, value = setting.partition("=")
    try:
        find_recipe("demo", [setting])
    except RecipeError as error:
        if "unknown key" in str(error) or not is_placeholder(value):
            pytest.fail(f"{command}: --set {key}: {error}")


def check_tuneline(command: Command, *, is_complete: bool = True) -> None:
    """Let the command line parse a command, without running it."""
    name, arguments = command.words[1], [word for word in command.words[2:] if word != "--help"]
    if name.startswith("--"):
        assert name in {option for each in CLI.params for option in each.opts}, command
        return
    assert name in CLI.commands, f"{command}: there is no command {name}"
    found = CLI.commands[name]
    try:
        context = found.make_context(name, arguments)
    except Exception as error:
        if not is_complete and type(error).__name__ == "MissingParameter":
            return
        pytest.fail(f"{command}: {getattr(error, 'message', '') or error}")
    for setting in context.params.get("set_") or ():
        check_set(command, setting)
    if profile := context.params.get("profile"):
        check_set(command, f"placement.profile={profile}")
    for parameter in found.params:
        value = context.params.get(parameter.name)
        if value is None or parameter.param_type_name != "argument":
            continue
        for word in [value] if isinstance(value, str | Path) else value or ():
            if name in ("compile", "lint", "plan", "run", "submit", "schedule", "init", "recipes"):
                if str(word) not in RECIPE_NAMES:
                    check_file(command, str(word))


@pytest.mark.parametrize("command", of("tuneline"), ids=str)
def test_the_command_line_takes_what_the_pages_say(command: Command) -> None:
    check_tuneline(command)


@pytest.mark.parametrize("command", inline_commands(), ids=str)
def test_the_running_text_names_commands_that_exist(command: Command) -> None:
    if command.words[0] == "tuneline":
        check_tuneline(command, is_complete=False)
    else:
        check_make(command)


def check_make(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for word in command.words[1:]:
        name, is_variable, _ = word.partition("=")
        if is_variable:
            assert re.search(rf"\$[({{]{name}[)}}]", makefile), f"{command}: make reads no {name}"
        else:
            assert name in targets, f"{command}: make has no target {name}"


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_make_has_the_targets(command: Command) -> None:
    check_make(command)


@pytest.mark.parametrize(
    "command", of("kubectl", "sh", "bash", "python", "python3", "pytest", "docker"), ids=str
)
def test_the_files_of_other_commands_exist(command: Command) -> None:
    words = command.words
    for flag, word in zip(words, words[1:], strict=False):
        if flag in ("-k", "kustomize") and not word.startswith("github.com"):
            check_file(command, f"{word}/kustomization.yaml")
        if flag == "-f" and words[0] in ("kubectl", "docker"):
            check_file(command, word)
        if flag == "-m" and word.startswith("tuneline"):
            assert importlib.util.find_spec(word), f"{command}: there is no module {word}"
    for word in words[1:]:
        if re.fullmatch(r"(tests|images|manifests|docs|kernels)/\S+", word):
            check_file(command, word.partition("::")[0])


@functools.cache
def demo_values() -> dict[str, Any]:
    return dict(yaml.safe_load((RECIPES_DIR / "demo.yaml").read_text(encoding="utf-8")))


def recipe_blocks() -> list[tuple[Block, dict[str, Any]]]:
    found = []
    for block in ALL_BLOCKS:
        try:
            values = yaml.safe_load(block.text)
        except yaml.YAMLError:
            continue
        if isinstance(values, dict) and values and set(values) <= set(Recipe.model_fields):
            found.append((block, values))
    return found


@pytest.mark.parametrize(("block", "values"), recipe_blocks(), ids=lambda each: str(each)[:60])
def test_parts_of_recipes_are_valid(block: Block, values: dict[str, Any]) -> None:
    # As many examples per step as any number of ranks in the pages divides.
    merged = demo_values() | {"train": {"global_batch_size": 48}} | values
    for section in ("prepare", "evaluate", "gate"):
        if "base_model" not in values and section in values and section in demo_values():
            merged[section] = {**demo_values()[section], **values[section]}
    try:
        Recipe.parse(merged)
    except RecipeError as error:
        pytest.fail(f"{block}: {error}")


def pages_with_commands() -> list[Path]:
    pages = {command.block.page for command in of("tuneline") if command.words[1] in RUN_HERE}
    return sorted(pages)


@pytest.mark.parametrize("page", pages_with_commands(), ids=lambda page: page.name)
def test_cheap_commands_of_a_page_run_in_its_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader's recipes are the demo, so that the commands need no network and no rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in PLACEHOLDERS:
        if name.endswith(".yaml") and "/" not in name and "pipeline" not in name:
            title = "support-bot" if name == "recipe.yaml" else Path(name).stem
            Path(name).write_text(yaml.safe_dump({**demo_values(), "name": title}))
    shutil.copytree(ROOT / "manifests", "manifests")
    runner = CliRunner()
    runner.invoke(app, ["compile", "recipe.yaml", "-o", "pipeline.yaml"], catch_exceptions=False)
    seen: set[tuple[str, ...]] = set()
    for command in of("tuneline"):
        words = command.words[1:]
        if command.block.page != page or words[0] not in RUN_HERE or words in seen:
            continue
        # They ask a cluster, a registry or the Hub.
        if "--cluster" in words or any(is_placeholder(w) and w not in PLACEHOLDERS for w in words):
            continue
        seen.add(words)
        result = runner.invoke(app, list(words))
        # plan ends with 1 if the demo's recipe does not fit the profile of the page.
        allowed = (0, 1) if words[0] == "plan" else (0,)
        error = result.exception
        assert result.exit_code in allowed and (error is None or isinstance(error, SystemExit)), (
            f"{command}: {result.output[-600:]} {error!r}"
        )
        assert result.output.strip(), f"{command} printed nothing"


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@functools.cache
def anchors_of(page: Path) -> set[str]:
    tokens = tokens_of(page)
    headings = [
        "".join(child.content for child in after.children or ())
        for token, after in zip(tokens, tokens[1:], strict=False)
        if token.type == "heading_open"
    ]
    explicit = re.findall(r"<a (?:id|name)=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    return {*map(slug, headings), *explicit}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for token in tokens_of(page):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if not target or re.match(r"[a-z]+:", str(target)):
                continue
            name, _, anchor = str(target).partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}: the link {target} leads to no file"
            if anchor:
                assert anchor in anchors_of(file), f"{page.name}: {file.name} has no #{anchor}"


def test_the_pages_are_found_by_the_readme() -> None:
    """A page that nothing links to is read by nobody."""
    linked = set()
    for page in PAGES:
        for token in tokens_of(page):
            for child in token.children or ():
                name = str(child.attrs.get("href", "")).partition("#")[0]
                linked.add((page.parent / name).resolve() if name else None)
    assert {page for page in PAGES if page not in linked} <= {ROOT / "README.md"}


def test_a_command_of_the_pages_is_found() -> None:
    """The tests above cannot fail if nothing is parsed."""
    assert len(of("tuneline")) > 60 and len(of("make")) > 5 and len(of("kubectl")) > 10
    assert len(inline_commands()) > 20 and len(recipe_blocks()) > 3
    assert {"recipes", "compile", "lint", "plan"} <= {c.words[1] for c in of("tuneline")}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tuneline lint --strict pipeline.yaml", "No such option"),
        ("tuneline lnit pipeline.yaml", "no command lnit"),
        ("tuneline run nothing.yaml", "there is no nothing.yaml"),
        ("tuneline run demo --set train.lr=1", "unknown key"),
        ("tuneline run demo --set train.max_steps=many", "max_steps"),
        ("tuneline plan demo --profile h1000", "h1000"),
        ("tuneline doctor", "Missing parameter: run"),
    ],
)
def test_a_wrong_command_is_found(text: str, says: str) -> None:
    (command,) = split(Block(ROOT / "README.md", 1, text), text)
    with pytest.raises((pytest.fail.Exception, AssertionError), match=says):
        check_tuneline(command)


def test_kubectl_renders_what_the_pages_apply() -> None:
    """Whole overlays are checked in tests/manifests; here only that each name can be rendered."""
    from kubectl import KUBECTL

    names = {
        word
        for command in of("kubectl")
        for flag, word in zip(command.words, command.words[1:], strict=False)
        if flag in ("-k", "kustomize") and not is_placeholder(word) and "github" not in word
    }
    assert names
    for name in names:
        done = subprocess.run([KUBECTL, "kustomize", ROOT / name], capture_output=True, text=True)
        assert done.returncode == 0 and "kind:" in done.stdout, f"{name}: {done.stderr}"

"""Say in one plain line what jsonargparse, argparse, YAML, Lightning and torch say in many."""

from __future__ import annotations

import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Collection, Sequence
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path

from src.errors import UserError

HIGHEST_SEED = 2**32 - 1
COMMANDS = ("fit", "validate", "test", "predict")
CONFIGS = Path("configs")
HELP = "See: python -m src.cli fit --help"

# What a value must be, where the type alone would not tell.
_WANTED = {
    "seed_everything": f"a whole number from 0 to {HIGHEST_SEED}",
    "data.source": "CIFAR10, ImageFolder, Sample, for predict Unlabelled, or the class path of another source",
    "data.augmentation": "null, or options such as --data.augmentation.rotation 10",
    "trainer.callbacks": "a callback's class path, e.g. lightning.pytorch.callbacks.EarlyStopping, or null",
    "model.optimizer": "an optimizer of torch, e.g. torch.optim.Adam",
    "unfreezing.stages": "a mapping from epochs to layers, e.g. '{0: 0, 3: 4}' with a space after each colon",
    "unfreezing.rates": "a mapping from epochs to rates, e.g. '{0: 0.001, 3: 0.0001}' with a space after each colon",
}
_REQUIRED = {
    "unfreezing.stages": "give a recipe, e.g. --config configs/last4.yaml",
    "data.source.root": "say where the images are, e.g. --data.source.init_args.root path/to/images",
}
LINKED = {
    "data.seed": "it is the one of --seed_everything.",
    "data.cuda_graphs": "it follows model.cuda_graphs.",
    "data.weights_input": "it follows model.weights and model.weights_input.",
    "model.num_classes": "it is the number of the data's classes.",
    "model.image_size": "it is the data's: give data.source.init_args.image_size, or enlarge with data.input_size.",
}
"""Settings that follow from others, and what to do instead of giving them."""
_LONGEST = 60  # characters of a value that a message repeats
_NESTED = (
    "--data.source.init_args.root",
    "--data.source.init_args.image_size",
    "--model.optimizer.init_args.lr",
    "--model.optimizer.init_args.weight_decay",
)
"""Options of a class that is itself an option's value, which the parser does not list."""
_TYPES = {"NoneType": ["null"], "bool": ["true", "false"], "dict": ["a mapping"], "list": ["a list"]}
_COMMAND = f"(?:{'|'.join(COMMANDS)})"

Options = Collection[str]


def plain(message: str, options: Options) -> str:
    """Turn a library's message into one line: what was wrong, where, what to do.

    Args:
        message: What the library said, lines and all.
        options: Known options, `--model.hidden` and so on, for suggestions.

    Returns:
        The plain line; of a message that nobody foresaw, the same words in one line.
    """
    text = " ".join(message.split())
    for pattern, explain in _RULES:
        if match := re.search(pattern, text):
            return explain(match, options)
    return text


def suggestion(word: str, known: Collection[str]) -> str:
    """Ask whether a similar known word was meant: `; did you mean …?`, or nothing."""
    # `trainer.foo` resembles every short option of the trainer, so the last part must be similar by itself.
    name = word.rpartition(".")[2]
    similar = [other for other in known if SequenceMatcher(None, name, other.rpartition(".")[2]).ratio() >= 0.6]
    close = get_close_matches(word, similar, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def either(words: Sequence[str]) -> str:
    """Join words as in `a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _unknown_option(match: re.Match[str], options: Options) -> str:
    word = match["word"].partition("=")[0]
    if not word.startswith("-"):
        return f"'{word}' belongs to no option: every value has its option in front of it, as in --model.hidden 128."
    return f"unknown option {word}{_meant(word, {*options, *_NESTED}) or f'. {HELP}'}"


def _unknown_key(match: re.Match[str], options: Options) -> str:
    word, known = match["key"], {option.lstrip("-") for option in {*options, *_NESTED}}
    return f"unknown key {word} in a configuration file{_meant(word, known) or f'. {HELP}'}"


def _meant(word: str, known: Collection[str]) -> str:
    """Ask whether the same name in another place was meant, or a similar one."""
    name = word.lstrip("-").rpartition(".")[2]
    same_end = sorted(other for other in known if other.endswith(f".{name}"))
    return f"; did you mean {either(same_end)}?" if same_end else suggestion(word, known)


def _linked(match: re.Match[str], options: Options) -> str:
    return f"{match['key']} cannot be set: {LINKED[match['key']]}"


def _unknown_command(match: re.Match[str], options: Options) -> str:
    commands = re.findall(r"\w+", match["choices"])
    return f"unknown command '{match['word']}'{suggestion(match['word'], commands) or f': give {either(commands)}.'}"


def _no_word(match: re.Match[str], options: Options) -> str:
    return f"{match['option'].rpartition('/')[2]} has no value: write one after it."


def _missing(match: re.Match[str], options: Options) -> str:
    return _say_missing([re.sub(rf"^{_COMMAND}\.", "", key) for key in match["keys"].split(", ")])


def _say_missing(keys: Sequence[str]) -> str:
    advice = next((_REQUIRED[key] for key in keys if key in _REQUIRED), "give a value.")
    return f"{' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} missing: {advice}"


def _no_config(match: re.Match[str], options: Options) -> str:
    path = Path(match["path"])
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if path.is_dir():
        return f"'{shown}' is a folder: give one of its files as --config."
    there = sorted(map(str, CONFIGS.glob("**/*.yaml")))
    return f"no configuration file '{shown}'; " + (f"there are {', '.join(there)}." if there else "give a YAML file.")


def _bad_value(match: re.Match[str], options: Options) -> str:
    return _explain(match["key"], match["rest"])


def _explain(key: str, rest: str) -> str:
    """Explain `Parser key "<key>": <rest>`, where the rest may hold another such message."""
    if inner := re.search(r'Parser key "(?P<key>[^"]*)": (?P<rest>.*)$', rest):
        if inner["key"] != key:
            return _explain(f"{key}.{inner['key']}", inner["rest"])
        value = re.search(r"Unable to load config ['\"](.*?)['\"]", rest)
        return f"{key} is {_quoted(value[1] if value else '')}: no such YAML file; or give --{key}.<option> <value>."
    if inner := re.search(r"(?:Option|Key) '(?P<name>[^']*)' is not (?:accepted|expected)", rest):
        owner = re.search(r"class_path[ =]'(?:[^']*\.)?([^'.]*)'", rest)
        what, which = (f": {owner[1]} has no such option", f" {owner[1]}") if owner else ("", "")
        if owner and owner[1] == "CIFAR10":
            what += " (for images of your own add --config configs/with/folder.yaml)"
        return f"unknown option {key}.{inner['name']}{what}. See: python -m src.cli fit --{key}.help{which}"
    if inner := re.search(r"the following arguments are required: (?P<keys>[\w., ]*\w)", rest):
        return _say_missing([f"{key}.{name}" for name in inner["keys"].split(", ")])
    if inner := re.search(r"Multiple subclasses with name (?P<name>\w+)\..*?: (?P<paths>[\w., ]*\w)", rest):
        ours_first = sorted(inner["paths"].split(", "), key=lambda path: not path.startswith("src."))
        return f"{key} is '{inner['name']}', a name that several have: give {either(ours_first)}."
    value = re.search(_VALUE, rest) or re.search(_WRONG_CLASS, rest)
    expected = _WANTED.get(key) or either(_types(rest))
    if value and expected:
        return f"{key} is {_quoted(value['value'])}: expected {expected}."
    return f"{key}: expected {expected}." if key in _WANTED else f"{key}: {rest}"


_VALUE = (
    r"(?:Given|Got) value: (?P<value>.*?)(?:\. Got value: .*| - (?:Expected a|Not a valid) .*| Given value type: .*)?$"
)
_WRONG_CLASS = r"(?:given class_path '|import path string: |Import path |Expected a path but )(?P<value>[^' ]+)"


def _types(text: str) -> list[str]:
    """List what a value may be, from `Expected a <class 'int'>` and `Expected a typing.Literal['a', 'b']`."""
    found = []
    for name, choices in re.findall(r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[([^\]]*)\])", text):
        found += _TYPES.get(name, [name]) if name else [choice.strip(" '") for choice in choices.split(",")]
    return list(dict.fromkeys(found))


def _quoted(value: str) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(value) or f"'{_short(value)}'"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _no_gpu(match: re.Match[str], options: Options) -> str:
    return (
        "trainer.accelerator asks for a GPU, but torch finds none here: leave out configs/with/gpu.yaml, "
        "or give --trainer.accelerator cpu --trainer.precision 32-true --model.cuda_graphs false."
    )


def _trainer_choice(match: re.Match[str], options: Options) -> str:
    choices = sorted(match["choices"].split(", "))  # Lightning keeps the accelerators in a set
    return f"trainer.{match['key']} is {_quoted(match['value'])}: expected {either(choices)}."


def _trainer_devices(match: re.Match[str], options: Options) -> str:
    return f"trainer.devices is not possible with the {match['accelerator'].lower()} accelerator: expected 1 or more."


def _trainer(match: re.Match[str], options: Options) -> str:
    return f"trainer.{match['key']}: {match['what'].rstrip('.')}."


_RULES: list[tuple[str, Callable[[re.Match[str], Options], str]]] = [
    (r'^Parser key "(?:config|cfg)": .*?(?:does not exist|not a file|not readable): \'?(?P<path>[^\']*)', _no_config),
    (r'^Parser key "(?P<key>[^"]*)": (?P<rest>.*)$', _bad_value),
    (r"unrecognized arguments: (?P<word>\S+)", _unknown_option),
    (r'^Linked "(?P<key>[^"]*)" must be given via', _linked),
    (r"(?:Subcommand|Group) '\w+' does not accept (?:option|nested key) '(?P<key>[^']*)'", _unknown_key),
    (rf"^(?:Option|Key) '(?:{_COMMAND}\.)?(?P<key>[^']*)' is not (?:accepted|expected)", _unknown_key),
    (r"invalid choice: '(?P<word>[^']*)'.*? \(choose from (?P<choices>[^)]*)\)", _unknown_command),
    (r"^argument (?P<option>\S+): expected (?:one|at least one|\d+) argument", _no_word),
    (r"the following arguments are required: (?P<keys>.*)$", _missing),
    (r"^Key \"(?P<keys>[^\"]*)\" is required", _missing),
    (r"No supported gpu backend found|`(?:CUDA|MPS)Accelerator` can not run on your system", _no_gpu),
    (
        r"invalid \w+ name: `(?P<key>\w+)='?(?P<value>.*?)'?`\..*?(?:Available names are|Example choices): "
        r"(?P<choices>(?:[\w.]+, )*\w+)",
        _trainer_choice,
    ),
    (r"`Trainer\(devices=.*\)` value is not a valid input using (?P<accelerator>\w+) accel", _trainer_devices),
    (r"`devices` selected with `(?P<accelerator>\w+)Accelerator`", _trainer_devices),
    (r"^`(?P<key>max_\w+|num_nodes|gradient_clip_algorithm)` (?P<what>.*)$", _trainer),
]


def plain_trainer(message: str) -> str:
    """Turn what Lightning says when a Trainer cannot be made into one line."""
    text = re.sub(r"\s*Find a complete list of options .*$", "", " ".join(message.split()))
    said = plain(text, ())
    return said if said != text else f"the trainer cannot be set up: {text.replace('`', '')}"


def hidden_error(error: BaseException | None) -> UserError | None:
    """Find the user's mistake among the causes of an error: jsonargparse wraps what classes raise."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        if isinstance(error, ModuleNotFoundError) and error.name is None:  # raised by hand: a callback lacks its extra
            return UserError(" ".join(str(error).split()))
        error = error.__cause__ or error.__context__
    return None


def known_options(parser: ArgumentParser) -> set[str]:
    """List the options of a parser and of its commands."""
    names: set[str] = set()
    for action in parser._actions:
        names.update(name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, _SubParsersAction):
            names.update(*(known_options(command) for command in action.choices.values()))
    return names

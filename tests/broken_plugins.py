"""Plugin packages, each broken in a way of its own, and the words that must name the reason.

An entry_points.txt that cannot be parsed is not among them: torch reads all of them when it is imported, and
fails.
"""

from typing import NamedTuple

HEAD = """
from dataclasses import dataclass, field
from typing import Any, ClassVar
import torch
import kvsieve
"""
POLICY = (
    HEAD
    + """
@dataclass(frozen=True)
class First(kvsieve.Policy):
    "Reads the first n tokens."
    n: int = 4
    name: ClassVar[str] = "NAME"

@kvsieve.hookimpl
def register_policies(register):
    register(First)
"""
)
TASK = """
from dataclasses import dataclass
import kvsieve
from kvsieve.compare.tasks import Task

@dataclass(frozen=True)
class Asked(Task):
    "Asks."
    name = "NAME"

@kvsieve.hookimpl
def register_tasks(register):
    register(Asked)
"""


def field(line: str) -> str:
    """The policy with this field instead of `n`."""
    return POLICY.replace("n: int = 4", line)


def method(line: str) -> str:
    """The policy with this method."""
    return field(f"n: int = 4\n    {line}")


def without(text: str, instead: str = "") -> str:
    assert text in POLICY
    return POLICY.replace(text, instead)


class Broken(NamedTuple):
    """A package `name`; in its code, NAME stands for it too. `reason` is a regular expression."""

    name: str
    code: str
    reason: str
    entry_points: str = "[kvsieve]\n{name} = {name}\n"
    metadata: str = "Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"


BROKEN = [
    # ------------------------------------------------ what importing it does
    Broken("b_missing_module", "import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere"),
    Broken("b_crash", "1 / 0", "ZeroDivisionError: division by zero"),
    Broken("b_syntax", "def (", "SyntaxError: invalid syntax"),
    Broken("b_exit", "import sys; sys.exit(3)", "SystemExit: 3"),
    Broken("b_interrupt", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    Broken("b_generator_exit", "raise GeneratorExit('early')", "GeneratorExit: early"),
    Broken("b_own_base", "class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    Broken("b_recursion", "def f(): f()\nf()", "RecursionError"),
    Broken(
        "b_no_text",
        "class Mute(Exception):\n    def __str__(self): raise SystemExit\nraise Mute",
        "Mute: <exception str.. failed>",
    ),
    Broken("b_long_text", "raise ValueError('x\\n' * 100_000)", "ValueError: x x x"),
    # ------------------------------------------------ what it announces
    Broken("b_no_attribute", POLICY, "AttributeError: .*'nothing'", "[kvsieve]\n{name} = {name}:nothing\n"),
    Broken("b_none", POLICY + "plugin = None", "it is None", "[kvsieve]\n{name} = {name}:plugin\n"),
    Broken("b_value", POLICY, "'two words' is neither a module nor", "[kvsieve]\n{name} = two words\n"),
    Broken(
        "b_unhashable",
        POLICY + "class Plugin:\n    __hash__ = None\nplugin = Plugin()",
        "TypeError: unhashable",
        "[kvsieve]\n{name} = {name}:plugin\n",
    ),
    Broken("b_takes_ours", POLICY, "announced before", "[kvsieve]\n{name} = kvsieve_policies\n"),
    Broken(
        "b_builtin_name",
        POLICY.replace("NAME", "sparq"),
        "plugin 'builtin' of b_builtin_name 1.0 .*'sparq' is already registered by kvsieve",
        "[kvsieve]\nbuiltin = {name}\n",
    ),
    Broken(
        "b_spoof",
        POLICY.replace("NAME", "spoofed"),
        "plugin 'builtin' of KVsieve 9.9 .*not loaded: its distribution calls itself kvsieve",
        "[kvsieve]\nbuiltin = {name}\n",
        "Metadata-Version: 2.1\nName: KVsieve\nVersion: 9.9\n",
    ),
    # ------------------------------------------------ its hooks
    Broken("b_signature", without("(register)", "(registrar)"), "PluginValidationError: .*registrar"),
    Broken(
        "b_misspelt",
        without("def register_policies", "def register_policy"),
        "unknown hook 'register_policy'",
    ),
    Broken(
        "b_unmarked", without("@kvsieve.hookimpl\n"), "register_policies is not marked with @kvsieve.hookimpl"
    ),
    Broken("b_no_hooks", "x = 1", "it has none of the hooks, register_policies, register_tasks, run_started"),
    Broken("b_nothing", without("register(First)", "pass"), "its register_policies registers nothing"),
    Broken("b_exit_later", without("register(First)", "raise SystemExit('bye')"), "SystemExit: bye"),
    Broken("b_twice", without("register(First)", "register(First); register(First)"), "'b_twice' is already"),
    # ------------------------------------------------ its classes
    Broken(
        "b_no_policy",
        without("register(First)", "register(dict)"),
        "'dict'> is not a subclass of kvsieve.Policy",
    ),
    Broken(
        "b_instance", without("register(First)", "register(First())"), "First.* is not a subclass of kvsieve"
    ),
    Broken("b_not_frozen", without("(frozen=True)"), "TypeError: cannot inherit non-frozen dataclass"),
    Broken("b_no_dataclass", without("@dataclass(frozen=True)\n"), "First must be a frozen dataclass"),
    Broken("b_nameless", without('    name: ClassVar[str] = "NAME"\n'), "First needs a class attribute name"),
    Broken("b_long_name", POLICY.replace("NAME", "n" * 5000), "at most 64 ASCII characters; it is 'nnn"),
    Broken("b_odd_name", POLICY.replace("NAME", "first tokens"), "an identifier .*; it is 'first tokens'"),
    Broken(
        "b_lookalike",
        POLICY.replace("NAME", "sp\N{CYRILLIC SMALL LETTER A}rq"),
        "ASCII characters; it is 'sp.rq'",
    ),
    Broken("b_name_field", without("ClassVar[str]", "str"), r"First.name is a field, .*write name: ClassVar"),
    Broken("b_hook_field", field("select: int = 4"), "First.select is a field, and Policy.select is not"),
    Broken(
        "b_paper", without("n: int = 4", "n: int = 4\n    paper = 2312.04985"), "First.paper must be a str"
    ),
    Broken("b_annotation", field("n: 'Nowhere' = 4"), "an annotation of First cannot be resolved: NameError"),
    Broken(
        "b_tensor",
        field("n: torch.Tensor = torch.ones(())"),
        "First.n is annotated .*Tensor.* not plain data",
    ),
    Broken(
        "b_callable",
        field("n: Any = print"),
        "the default of First.n is <built-in function print>, which is not",
    ),
    Broken(
        "b_nested",
        field("n: list[torch.dtype] = field(default_factory=list)"),
        "First.n is annotated list.torch",
    ),
    Broken(
        "b_factory",
        field("n: Any = field(default_factory=object)"),
        "the default of First.n is <object object",
    ),
    Broken("b_private", field("_n: int = 4"), "First._n cannot be given"),
    Broken("b_no_init", field("n: int = field(default=4, init=False)"), "First.n cannot be given"),
    Broken(
        "b_priority", method("def priority(self, kv): ..."), "First has `priority`, but does not declare how"
    ),
    Broken(
        "b_on_attend",
        method("def on_attend(self, kv, mass): ..."),
        "First has `on_attend`, but does not observe",
    ),
    Broken(
        "b_on_attention", method("def on_attention(self, kv, mass): ..."), "First.on_attention is no hook"
    ),
    Broken(
        "b_near", method("def selct(self, query, kv): ..."), "First.selct would never be called: did you mean"
    ),
    Broken("b_task", TASK.replace("(Task)", ""), "Asked'> is not a subclass of kvsieve.Task"),
    Broken("b_task_name", TASK.replace("NAME", "needle"), "'needle' is already registered by kvsieve"),
]

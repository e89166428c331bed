"""The house rules that a linter does not know, checked on the source of the package."""

import ast
import importlib
import inspect
import pathlib
import pkgutil

import equinox as eqx

import jaxem

PACKAGE = pathlib.Path(jaxem.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
MOST_LINES, MOST_LINES_OF_A_FILE, MOST_NAMES, MOST_METHODS = 20_550, 350, 29, 7


def found(offends):
    """Where nodes of the package's syntax trees offend, as file:line."""
    return [
        f"{name}:{node.lineno}"
        for name, tree in sorted(TREES.items())
        for node in ast.walk(tree)
        if offends(node)
    ]


def none(offences):
    """Fails with every offence on a line of its own."""
    assert not offences, "\n" + "\n".join(map(str, offences))


def calls(node, function):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == function


def modules(base=eqx.Module):
    """Every class of the package, private ones too, that is `base` or comes from it."""
    for module in pkgutil.walk_packages(jaxem.__path__, "jaxem."):
        importlib.import_module(module.name)

    def below(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    classes = {cls for cls in [base, *below(base)] if cls.__module__.split(".")[0] == "jaxem"}
    # a class written in a file, not one that Equinox makes for a repr or a test makes on the way
    return sorted((c for c in classes if definition(c)), key=lambda c: (c.__module__, c.__name__))


def definition(cls):
    """The class statement of a class, or None."""
    path = pathlib.Path(inspect.getfile(cls)).relative_to(PACKAGE)
    for node in ast.walk(TREES[str(path)]):
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            return node
    return None


def methods(cls, of_decorators=lambda names: True):
    """Names of the methods in the body of a class whose decorators pass."""
    return {
        node.name
        for node in definition(cls).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and of_decorators({ast.unparse(d).split(".")[-1] for d in node.decorator_list})
    }


def test_nothing_is_decided_by_the_presence_of_an_attribute():
    none(
        found(
            lambda node: calls(node, "hasattr") or (calls(node, "getattr") and len(node.args) == 3)
        )
    )


def test_no_constructor_calls_another():
    none(
        found(
            lambda node: (
                isinstance(node, ast.Attribute)
                and node.attr == "__init__"
                and ast.unparse(node.value).startswith("super(")
            )
        )
    )


def test_one_helper_makes_objects_without_their_constructor():
    places = found(
        lambda node: (
            isinstance(node, ast.Attribute)
            and node.attr == "__new__"
            and ast.unparse(node.value) == "object"
        )
    )
    none(places if len(places) > 1 else [])


def test_files_are_short():
    lines = {name: len(text.splitlines()) for name, text in SOURCES.items()}
    none([f"{name}: {n} lines" for name, n in lines.items() if n > MOST_LINES_OF_A_FILE])


def test_the_package_does_not_grow():
    """A ceiling a little above today's size: lower it when lines go."""
    assert sum(len(text.splitlines()) for text in SOURCES.values()) <= MOST_LINES


def test_the_top_level_holds_few_names():
    names = [name for name in vars(jaxem) if not name.startswith("_")]
    assert len(names) <= MOST_NAMES, names


def test_concrete_methods_are_never_overridden():
    concrete = {
        cls: methods(cls, lambda names: "abstractmethod" not in names) - {"__check_init__"}
        for cls in modules()
    }
    assert len(concrete) > 50
    none(
        [
            f"{cls.__qualname__}.{name} overrides {base.__qualname__}'s"
            for cls in concrete
            for base in cls.__mro__[1:]
            if base in concrete
            for name in sorted(methods(cls) & concrete[base])
        ]
    )


def test_an_emission_is_few_methods():
    """Regressions, and what wraps other emissions, too."""
    emissions = [c for c in modules(jaxem.emissions.AbstractEmission) if not inspect.isabstract(c)]
    assert len(emissions) > 20
    public = {
        cls.__name__: sorted(
            name
            for name in methods(cls, lambda names: not names & {"property", "cached_property"})
            if not name.startswith("_")
        )
        for cls in emissions
    }
    none([f"{name}: {has}" for name, has in public.items() if len(has) > MOST_METHODS])

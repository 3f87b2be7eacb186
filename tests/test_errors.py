import inspect

import edge_ser
from edge_ser import errors


def own_errors():
    return {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}


def test_every_error_is_public_and_derives_from_the_base():
    assert set(own_errors()) <= set(edge_ser.__all__)
    assert all(issubclass(cls, edge_ser.EdgeSerError) for cls in own_errors().values())


def test_every_error_stands_in_the_tree_of_the_docstring():
    assert all(name in errors.__doc__ for name in own_errors())


def test_a_missing_dependency_is_an_import_error_too():
    assert issubclass(edge_ser.MissingDependency, ImportError)

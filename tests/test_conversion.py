"""What is no array of JAX keeps its values on the way in, or is refused with the line to write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem._core.conversion import as_arrays

MASKED = np.ma.masked_greater(np.array([[1.0, 2.0], [3.0, 1e4]]), 100.0)


def sparse():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    return scipy_sparse.csr_matrix(np.eye(2))


def nullable(*values):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": pandas.array(values, dtype="Int64"), "b": [0.5, 1.5]})


REFUSED = {
    "masked": (lambda: MASKED, r"1 masked entries.*getmaskarray"),
    "sparse": (sparse, r"sparse.*toarray"),
    "text": (lambda: np.array([["a"], ["b"]]), r"text.*return_inverse"),
    "objects": (lambda: np.array([["a"], [1]], object), r"no number, 'a'"),
    "none": (lambda: np.array([[None], [1]], object), r"no number, None"),
    "missing in a nullable column": (lambda: nullable(1, None), r"no number, <NA>"),
    "dates": (lambda: np.array(["2020-01-01"], "datetime64[D]"), r"dates.*astype"),
    "records": (lambda: np.zeros(2, [("a", int)]), r"no numbers.*astype"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_numbers_is_refused_with_the_line_to_write(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        as_arrays((make(), jnp.zeros(2)))


TAKEN = {
    "no entry masked": lambda: np.ma.masked_greater(np.array([[1.0, 2.0]]), 100.0),
    "nullable without missing": lambda: nullable(1, 2),
    "objects that are numbers": lambda: np.array([[1, 2.5], [True, np.float32(3)]], object),
    "long doubles": lambda: np.array([[1.5, 2.0]], np.longdouble),
    "big endian": lambda: np.array([[1.5, 2.0]], ">f8"),
    "half precision": lambda: np.array([[1.5, 2.0]], np.float16),
    "half precision of JAX": lambda: jnp.array([[1.5, 2.0]], jnp.bfloat16),
    "booleans": lambda: np.array([[True, False]]),
    "no observations": lambda: np.zeros((0, 2)),
    "NaN and infinity": lambda: np.array([[np.nan, 1.0], [np.inf, 2.0]]),
}


@pytest.mark.parametrize("case", TAKEN)
def test_numbers_keep_their_values(case):
    given = TAKEN[case]()
    taken = as_arrays(given)
    assert isinstance(taken, jax.Array)
    np.testing.assert_array_equal(np.asarray(taken), np.asarray(given).astype(float))


TOO_LARGE = {
    "integers": (np.array([[2**31]]), "integers from 2147483648"),
    "unsigned": (np.array([[2**63]], np.uint64), "integers from"),
    "floats": (np.array([[1e300], [1.0]]), r"1e\+300.*float32"),
    "seconds since 1970": (1.7e9 + np.arange(9.0)[:, None], r"column 0 .*rounds.*subtract"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_numbers_that_float32_does_not_hold_are_refused(case):
    given, message = TOO_LARGE[case]
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        as_arrays(given)
    assert isinstance(as_arrays(given), jax.Array)  # wider types hold them


def test_ordinary_float64_data_are_rounded_to_float32():
    given = np.random.default_rng(0).normal(1000, 0.1, (50, 2))
    with jax.enable_x64(False):
        np.testing.assert_allclose(as_arrays(given), given, rtol=1e-7)


def test_masked_steps_of_sequences_are_unobserved():
    counts = np.ma.masked_equal([[[2], [999], [3]], [[9], [8], [999]]], 999)
    data = jaxem.Sequences(counts)
    np.testing.assert_array_equal(data.observed, [[True, False, True], [True, True, False]])
    assert int(jnp.max(data.values)) == 9
    ragged = jaxem.Sequences.from_list([counts[0], counts[1][:1]])
    np.testing.assert_array_equal(np.asarray(ragged.observed)[0, :3], [True, False, True])
    with pytest.raises(ValueError, match="masked in part"):
        jaxem.Sequences(np.ma.masked_equal(np.array([[[2, 1], [1, 5]]]), 2))


def test_sequences_of_numpy_arrays_make_no_warning():
    with jax.enable_x64(False):
        for dtype in (np.int64, np.float64):
            parts = [np.zeros((3, 1), dtype), np.ones((5, 1), dtype)]
            assert jaxem.Sequences.from_list(parts).values.shape == (2, 5, 1)
            assert jaxem.Sequences.split(np.concatenate(parts), [3, 5]).values.shape == (2, 5, 1)
        with pytest.raises(ValueError, match="integers from"):
            jaxem.Sequences.from_list([np.full((3, 1), 2**40)])


def test_arrays_of_jax_and_tracers_pass_as_they_are():
    x = jnp.zeros((2, 1))
    assert as_arrays(x) is x
    assert jax.jit(lambda x: as_arrays({"x": x})["x"] + 1)(x).shape == x.shape

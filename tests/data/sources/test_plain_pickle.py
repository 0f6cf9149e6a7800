import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdav_fast.data.sources.plain_pickle import load_plain


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"cnumpy\nload\n.",
        b"cnumpy\nmemmap\n.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\ngetattr\n.",
        b"ckdav_fast.data.sources.plain_pickle\nload_plain\n.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"\x82\x01.",
        b"Pid\n.",
    ],
)
def test_nothing_but_arrays_is_made_from_a_pickle(content):
    with pytest.raises(pickle.UnpicklingError):
        load_plain(content)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(_PLAIN, st.integers(0, 5))
def test_plain_values_come_back(value, protocol):
    assert load_plain(pickle.dumps(value, protocol)) == value


@given(st.integers(0, 5), st.sampled_from(["u1", "<i4", ">i8", "f4"]), st.booleans())
def test_arrays_come_back(protocol, dtype, fortran):
    array = np.arange(12).reshape(3, 4).astype(dtype, order="F" if fortran else "C")
    content = pickle.dumps(array, protocol)
    loaded = load_plain(content)
    assert loaded.dtype == pickle.loads(content).dtype
    assert np.array_equal(loaded, array)


@given(st.binary(max_size=60))
def test_bytes_at_random_raise_one_kind_of_error(content):
    try:
        load_plain(content)
    except pickle.UnpicklingError as error:
        assert "\n" not in str(error)  # noqa: PT017

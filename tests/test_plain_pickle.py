"""Pickles from someone else: arrays of uint8 come out, nothing runs, and nothing crashes."""

from __future__ import annotations

import pickle
import random
import struct
import time

import numpy as np
import pytest

from fisher_forget.experiments.plain_pickle import loads

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)


def old(
    *,
    shape: bytes = b"K\x02M\x00\x0c\x86",
    kind: bytes = b"U\x02u1",
    state: bytes = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
    fortran: bytes = b"\x89",
    raw: bytes = b"T" + struct.pack("<i", PIXELS.size) + PIXELS.tobytes(),
    before: bytes = b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R",
) -> bytes:
    """{"data": an array, "labels": [7]} as NumPy wrote it with Python 2, part by part."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + before + b"(K\x01" + shape
    array += b"cnumpy\ndtype\n" + kind + b"K\x00K\x01\x87R" + state + fortran + raw + b"tb"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x07au."


class TestReads:
    def test_what_python_2_wrote(self):
        found = loads(old())
        assert np.array_equal(found["data"], PIXELS)
        assert found["labels"] == [7]

    @pytest.mark.parametrize("protocol", [3, 4, 5])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_what_python_3_writes(self, protocol, order):
        given = {
            "data": np.asarray(PIXELS, order=order),  # type: ignore[call-overload]
            "again": PIXELS[:1],
            "none": np.zeros((0, 5), np.uint8),
            "labels": [3, -4, 2**70],
            "text": ["a", "\u00e9\u4e2d"],
            "more": (1.5, None, True, b"bytes", {"b": []}),
        }
        found = loads(pickle.dumps(given, protocol))
        assert found.keys() == given.keys()
        for name in ("data", "again", "none"):
            assert np.array_equal(found[name], given[name])
        assert all(found[name] == given[name] for name in ("labels", "text", "more"))


# each of these made NumPy or the unpickler crash, hang, or take all memory, or might have
CRAFTED = {
    "objects": old(kind=b"U\x01O"),
    "times without a unit": old(kind=b"U\x06M8[ns]"),
    "records": old(kind=b"U\x04i4,O"),
    "huge items": old(kind=b"U\x0bV2147483647"),
    "a state of fields": old(
        kind=b"U\x03V16",
        state=b"(K\x03U\x01|N(U\x01at}U\x01aK\x00sK\x10K\x08K\x3ftb",
    ),
    "a state of a huge item": old(state=b"]b", kind=b"U\x02V8"),
    "no type": old(kind=b"N"),
    "a negative shape": old(shape=b"J\xff\xff\xff\xff\x85"),
    "an enormous shape": old(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"),
    "a shape that overflows": old(shape=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x02\x86"),
    "a shape of many": old(shape=b"(" + b"J\xff\xff\xff\x7f" * 100_000 + b"t"),
    "a shape that is no tuple": old(shape=b"]"),
    "a shape of bools": old(shape=b"\x88\x85"),
    "too little content": old(raw=b"U\x01a"),
    "content that is a list": old(raw=b"]"),
    "another class": old(before=b"cnumpy\ndtype\nK\x00\x85U\x01b\x87RN"),
    "an array by its constructor": b"\x80\x02cnumpy\nndarray\nM\xe8\x03\x85U\x01O\x86R.",
    "the same by NEWOBJ": b"\x80\x02cnumpy\nndarray\nM\xe8\x03\x85U\x01O\x86\x81.",
    "strides": b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93(K\x0a\x85\x8c\x02u1C\x03abcK\x00J\x9c\xff"
    b"\xff\xff\x85tR.",
    "objects from a buffer": b"\x80\x05\x8c\x12numpy._core.numeric\x8c\x0b_frombuffer"
    b"\x93(C\x08AAAAAAAA\x8c\x01OK\x01\x85\x8c\x01CtR.",
    "a deep key": b"\x80\x02}()" + b"\x85" * 200_000 + b"K\x01u.",
    "a deep set": b"\x80\x04\x8f()" + b"\x85" * 200_000 + b"\x90.",
    "a deep type": b"\x80\x02cnumpy\ndtype\n()" + b"\x85" * 100_000 + b"K\x00K\x01tR.",
    "a large frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}",
    "bytes that are not there": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "text that is not there": b"\x80\x02T\xff\xff\xff\x7fabc.",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "a persistent name": b"\x80\x02U\x01aQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"(ios\nsystem\n.",
    "an object": b"(cos\nsystem\no.",
    "a number": b"\x80\x02K\x01.",
    "nothing": b"",
    "no end": b"\x80\x02}",
    "an empty stack": b".",
    "a lone mark": b"\x80\x02}(.",
    "items for no list": b"\x80\x02}K\x01a.",
    "keys for a list": b"\x80\x02]U\x01aK\x01s.",
    "an odd number of keys": b"\x80\x02}(U\x01au.",
    "a memo without an entry": b"\x80\x02h\x05.",
    "past a mark": b"\x80\x02K\x01K\x02(\x86.",
}


class TestRefuses:
    @pytest.mark.parametrize("name", CRAFTED)
    def test_what_is_made_up(self, name):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=r"\w"):
            loads(CRAFTED[name])
        assert time.perf_counter() - start < 2

    def test_a_large_memo_costs_nothing(self):
        assert loads(b"\x80\x02}r\xff\xff\xff\x1f.") == {}

    def test_a_list_that_holds_itself(self):
        found = loads(b"\x80\x02}U\x06labels]q\x00h\x00as.")
        assert found["labels"][0] is found["labels"]  # for the caller to refuse

    def test_changed_bytes_are_read_or_refused(self):
        """2,000 mutations: plain values come out, or a ValueError."""
        rng = random.Random(0)
        good = [old(), pickle.dumps({"data": PIXELS, "labels": [1, 2]}, 5)]
        made_up = [b"R", b"b", b"N", b"U\x01O", b"\x85", b"J\xff\xff\xff\x7f", b"h\x00", b"s", b"("]
        outcomes = {"read": 0, "refused": 0}
        for index in range(2000):
            changed = bytearray(good[index % 2])
            for _ in range(rng.choice([1, 1, 2, 4, 8])):
                at = rng.choice([rng.randrange(200), rng.randrange(len(changed))]) % len(changed)
                kind = rng.random()
                if kind < 0.6:
                    changed[at] = rng.randrange(256)
                elif kind < 0.8:
                    del changed[at : at + rng.choice([1, 2, 5])]
                else:
                    changed[at:at] = rng.choice(made_up)
            try:
                found = loads(bytes(changed))
            except ValueError:
                outcomes["refused"] += 1
                continue
            outcomes["read"] += 1
            for value in found.values():
                assert isinstance(
                    value, np.ndarray | list | tuple | dict | str | bytes | int | float | None
                )
                assert not isinstance(value, np.ndarray) or value.dtype == np.uint8
        assert min(outcomes.values()) > 100

"""Clothes that nobody of the cast wears together."""

import numpy as np
import pytest

from s2dm.data.puppets import PERSONS, PuppetClips
from s2dm.data.puppets.outfits import dress, new_outfits, outfit


def test_outfits_are_split_and_none_is_of_the_cast():
    train, test = set(new_outfits("train")), set(new_outfits("test"))
    worn = {outfit(person) for person in PERSONS}
    assert len(train | test | worn) == 8 * 6 * 6 * 3
    assert not train & test
    assert not worn & (train | test)
    assert len(test) == 84


def test_held_out_outfits_have_every_word():
    for column, words in enumerate(zip(*new_outfits("test"), strict=True)):
        assert set(words) == {clothes[column] for clothes in new_outfits("train")}


def test_a_dressed_person_is_the_same_in_a_pattern_that_such_tops_have():
    rng = np.random.default_rng(0)
    for clothes in new_outfits("test"):
        who = dress(PERSONS[0], clothes, rng)
        assert outfit(who) == clothes
        assert (who.hair, who.height, who.glasses) == ("short", 1.0, True)
        assert who.pattern in {other.pattern for other in PERSONS if other.top == who.top}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='"train" or "test"'):
        new_outfits("all")


def _clothes(caption):
    """ "a black coat and blue jeans" of a caption."""
    return caption.partition("wearing ")[2].partition(" is ")[0]


def test_clips_are_recombined_within_their_split():
    of_cast = {_clothes(clip.caption) for clip in _first("train", 0.0)}
    for split in ("train", "test"):
        allowed = {
            f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {top} and {other} {trousers}"
            for colour, top, other, trousers in new_outfits(split)
        }
        found = {_clothes(clip.caption) for clip in _first(split, 1.0)}
        assert found <= allowed
        assert not found & of_cast
        assert len(found) > 5


def _first(split, recombined):
    clips = PuppetClips(split, takes=1, size=16, frames=1, recombined=recombined)
    return [clips[index] for index in range(0, len(clips), len(clips) // 7)]

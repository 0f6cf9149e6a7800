"""A teacher's answers to fixed views of the training images, on disk: `docs/cached-teacher.md` says in which form."""

from kdav_fast.teachers.cache.card import CacheCard, read_card
from kdav_fast.teachers.cache.layout import Layout, Parameter
from kdav_fast.teachers.cache.reader import AnswerCache
from kdav_fast.teachers.cache.stored import to_answers
from kdav_fast.teachers.cache.writer import ShardDraft, prepare

__all__ = [
    "AnswerCache",
    "CacheCard",
    "Layout",
    "Parameter",
    "ShardDraft",
    "prepare",
    "read_card",
    "to_answers",
]

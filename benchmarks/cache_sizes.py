"""How large the files of a cached teacher are for ImageNet, by what they keep of a view: the table of its page.

Nothing is measured: sizes follow from the layout, and a test holds that files have them.
"""

from kdav_fast.teachers.cache import CacheCard, Layout, Parameter
from kdav_fast.teachers.cache.shard_file import cache_size

VIEWS = (10, 50, 100, 300)
TOPS = (None, 100, 50, 10)
CROP_AND_FLIP = {"boxes": Parameter(dtype="fp32", width=4), "flips": Parameter(dtype="bool", width=1)}
_GIB = 2**30


def imagenet(views: int, top: int | None, features: bool) -> Layout:
    """ImageNet's training images in random crops that may be flipped, and a teacher with features of width 512."""
    return Layout(
        images=1_281_167,
        views=views,
        classes=1_000,
        width=512,
        features="fp16" if features else None,
        top=top,
        parameters=CROP_AND_FLIP,
    )


def size_table() -> list[str]:
    """In Markdown, a line each: GiB by number of views."""
    lines = [
        f"| logits | features | bytes a view | {' | '.join(f'V {views}' for views in VIEWS)} |",
        "|---|---|" + "---:|" * (1 + len(VIEWS)),
    ]
    for top in TOPS:
        for features in (True, False):
            layouts = [imagenet(views, top, features) for views in VIEWS]
            sizes = [f"{cache_size(CacheCard(layout=each, facts={})) / _GIB:,.1f}" for each in layouts]
            kept = "all 1,000" if top is None else f"highest {top}"
            cells = [kept, "fp16" if features else "none", f"{layouts[0].bytes_per_view:,}", *sizes]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(size_table()))

"""An index of images that follows a region dataset."""

from modeling_interbert import IndexReport, InterBERTRetriever
from processing import RegionDataset


def update_index(retriever: InterBERTRetriever, regions: RegionDataset, source: str) -> tuple[IndexReport, int]:
    """
    Brings an index up to date: afterwards it has the images of the dataset with their regions, and no others.

    Args:
        source: What the images are of, for the message.

    Returns:
        What [`InterBERTRetriever.index`] reports, and how many images were removed.

    Raises:
        ValueError: none of the images in the index is of the dataset.
    """
    gone = set(retriever.image_ids).difference(regions.image_ids)
    if 0 < len(gone) == len(retriever):
        raise ValueError(
            f"`--index_dir` has an index of {len(gone):,} images, of which {source} has none: give another folder, or "
            "remove this one."
        )
    if gone:
        retriever.remove(gone)
    return retriever.index(regions), len(gone)

"""An index of images that follows a region dataset."""

from modeling_interbert import IndexReport, InterBERTRetriever
from processing import RegionDataset


def update_index(retriever: InterBERTRetriever, regions: RegionDataset, source: str) -> IndexReport:
    """
    Brings an index up to date: afterwards it has the images of the dataset with their regions, and no others.

    Args:
        source: What the images are of, for the message.

    Raises:
        ValueError: none of the images in the index is of the dataset.
    """
    if len(retriever) and set(retriever.image_ids).isdisjoint(regions.image_ids):
        raise ValueError(
            f"`--index_dir` has an index of {len(retriever):,} images, of which {source} has none: give another "
            "folder, or remove this one."
        )
    return retriever.index(regions, remove_others=True)

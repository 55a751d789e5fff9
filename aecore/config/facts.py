"""The facts of a data set that are known before any of its rows are held in memory."""

from collections.abc import Mapping
from itertools import accumulate
from math import prod
from typing import Annotated, Any, Literal

from aecore.core.fingerprint import Frozen, Later, Unhashed
from aecore.core.types import Shape


class TableColumns(Frozen):
    """The columns of a table in which each feature has a column of its own.

    All but `missing` is empty for images, for vectors, and for models that earlier versions trained.
    """

    features: tuple[str, ...] = ()
    """Names of the columns of features, in the order in which a row holds them."""
    types: tuple[str, ...] = ()
    """Arrow types of these columns, as they are written in the file."""
    offsets: tuple[int | float, ...] = ()
    """Number that is subtracted from each feature, in double precision, before it becomes float32; empty where nothing
    is subtracted. Where values are large beside their differences, float32 would lose the differences."""
    label: str | None = None
    """Name of the column of labels; None where labels are not used."""
    categories: tuple[tuple[str, ...], ...] = ()
    """The texts that each feature can be, in the order in which a row holds a value for each of them: 1 for the text
    that the feature is, 0 for the others (one-hot). () for a number; empty where all features are numbers."""
    unread: tuple[tuple[str, str], ...] = ()
    """Columns of text that are not read because of what they hold, each with the reason."""
    missing: Literal["refuse", "impute"] = "refuse"
    """What becomes of missing values, `data.missing`; this one holds for vectors as well."""

    @property
    def owners(self) -> tuple[int, ...]:
        """The number of the feature to which each value of a row belongs."""
        return tuple(n for n, texts in enumerate(self._texts()) for _ in texts or ("",))

    @property
    def cells(self) -> tuple[str, ...]:
        """The name of each value of a row: that of its column and, of a category, its text."""
        named = zip(self.features, self._texts(), strict=True)
        return tuple(cell for name, texts in named for cell in ([f"{name} = {text}" for text in texts] or [name]))

    @property
    def cell_offsets(self) -> tuple[int | float, ...]:
        """The number that is subtracted from each value of a row; the tuple is empty if nothing is subtracted."""
        return tuple(self.offsets[number] for number in self.owners) if self.offsets else ()

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Where in a row the values of each category begin and end."""
        ends = [*accumulate(max(1, len(texts)) for texts in self._texts())]
        return tuple((end - len(texts), end) for end, texts in zip(ends, self._texts(), strict=True) if texts)

    def _texts(self) -> tuple[tuple[str, ...], ...]:
        return self.categories or ((),) * len(self.features)


def columns_of(config: Mapping[str, Any]) -> TableColumns:
    """Return the columns of the table that a model was trained on, from the config of its finetuning's result."""
    return TableColumns.model_validate(config.get("columns", {}))


def has_no_names(config: Mapping[str, Any]) -> bool:
    """Say whether a model that reads vectors was trained by an earlier version, which kept no names of columns."""
    return "columns" not in config and len(config["layers"][0]["in_shape"]) == 1


def nameless(model: str) -> str:
    """Return the warning about a model of a table for which `has_no_names`."""
    return (
        f"{model} was trained by an earlier version, which kept no names of columns: columns are taken by position, in "
        "the order of its training data; a model that is trained now has names"
    )


class RowCounts(Frozen):
    """The numbers of normal rows and of anomalies of a split."""

    normal: int
    anomalies: int

    @property
    def rows(self) -> int:
        """Number of all rows of the split."""
        return self.normal + self.anomalies


class Facts(Frozen):
    """Shape, values, classes and size of a data set, which the driver learns without holding its rows in memory."""

    digest: str
    """SHA-256 over the files of the data set and, for Parquet, over the names of the columns that are read and a mark
    if images are turned upright."""
    shape: Shape
    """Shape of one row: (channels, height, width) of an image, (features,) of a vector."""
    levels: int
    """Number of integer values, from 0 to levels - 1, that a pixel can take; 0 for floating-point data."""
    classes: tuple[str, ...]
    """Names of the classes; empty for data without labels."""
    labels: Annotated[tuple[str, ...], Later()] = ()
    """Values of the labels, in order, where these only tell anomalies from normal rows (`data.anomaly`); `classes` is
    then empty, so that nothing else uses the labels."""
    rows: int
    """Number of rows of all splits together."""
    trained_classes: Annotated[int | None, Unhashed()] = None
    """Number of classes that the training rows have; None without labels, or where it is not known before a worker
    reads the rows. It follows from the data and how they are split, which are hashed."""

    @property
    def can_classify(self) -> bool:
        """Whether the training rows have two classes or more, as far as is known."""
        return bool(self.classes) and self.trained_classes != 1

    columns: Annotated[TableColumns, Unhashed()] = TableColumns()
    """The columns of a table, which the digest covers."""
    row_counts: Annotated[tuple[RowCounts, ...], Unhashed()] = ()
    """With `data.anomaly`, how many normal rows and anomalies are in training, in validation, in test and among the
    rows that are not used; empty where this is not known before a worker reads the rows."""

    @property
    def has_anomalies(self) -> bool:
        """Whether labels tell which rows are anomalies."""
        return bool(self.labels)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory: uint8 pixels, or float32 values."""
        return prod(self.shape) * (1 if self.levels else 4)

"""Cost models on disk: frozen content, one JSON file, written atomically with its checksum."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsesearch.artifacts import read_json, write_json
from sparsesearch.errors import ArtifactError, first_problem


class Frozen(BaseModel):
    """A part of a cost model."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredModel(Frozen):
    """A whole one; what it is and its version stand in the file."""

    format: ClassVar[str]
    schema_version: ClassVar[str]

    def save(self, path: Path) -> None:
        """Write the JSON atomically, with its checksum."""
        write_json(path, self.model_dump(mode="json"), format=self.format, schema_version=self.schema_version)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a cost model file.

        Raises:
            ArtifactError: it is missing, truncated, foreign, edited, of a newer major version, or inconsistent.
        """
        content = read_json(path, format=cls.format, schema_version=cls.schema_version)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ArtifactError(
                f"{path}: {first_problem(error)} Make it again with `sparsesearch calibrate`."
            ) from error

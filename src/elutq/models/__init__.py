"""The model that ships with the package: trained by this project, small, enough to test the whole path."""

from importlib.resources import files
from pathlib import Path

from elutq.errors import MissingFileError


def bundled_model() -> Path:
    """Folder of the bundled 7-million-parameter Llama (its model card is `README.md` there).

    Raises:
        MissingFileError: the package was installed without its data, or inside a zip file.
    """
    folder = Path(str(files(__name__))) / "llama-7m"
    if not (folder / "model.safetensors").is_file():
        raise MissingFileError(
            f"the bundled model is not at {folder}; reinstall elutq from an ordinary wheel"
        )
    return folder

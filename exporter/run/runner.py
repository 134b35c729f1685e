"""What a runner declares: its name, the stage it runs, whether it can run here, how it opens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from calibration.out.description import Description
    from calibration.out.folder import StageFolder
    from exporter.run.sessions import DecoderSession
    from plugins.errors import InputError

__all__ = ["Runner"]


class Runner(ABC):
    """One way to run a decoder. A file of exporter/run that defines RUNNER adds one; it imports
    nothing heavy until the runner opens.

    Attributes:
        name: as --runner takes it.
        stage: whose folder it runs, one of STAGES.
        help: one line for --help.
        automatic: 0 where --runner auto never chooses it; of the others the one with the highest
            number that can run wins.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    help: ClassVar[str]
    automatic: ClassVar[int] = 0

    def unavailable(self) -> InputError | None:
        """Why nothing can be run with it on this machine; None where it can."""
        return None

    def check(self, folder: StageFolder) -> None:  # noqa: B027  (nothing, for most)
        """Look whether this folder can be run here, before much is read.

        Raises:
            InputError: it was made for another machine or version.
        """

    def describe(self, folder: StageFolder) -> Description:
        """What model.json says about the model.

        Raises:
            InputError: it is missing, damaged, or of another format.
        """
        return folder.description()

    @abstractmethod
    def open(self, folder: StageFolder, description: Description) -> DecoderSession:
        """A session on the folder, whose files are taken with folder.file(), which verifies them.

        Raises:
            InputError: a file is damaged, or the runtime refuses it.
        """

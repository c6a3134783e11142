"""Files named by a URL are downloaded into iopath's cache, and nowhere else."""

from __future__ import annotations

from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler

from ..errors import InputError, format_value


class Downloads(HTTPURLHandler):
    """iopath's own handler keeps a file under the path of its URL, wherever ``..`` lead."""

    def _get_local_path(self, path: str, *args, **kwargs) -> str:
        """The file in the cache.

        Raises:
            InputError: the URL has ``..`` in its path.
            OSError: the download failed.
        """
        if ".." in urlparse(path).path.split("/"):
            raise InputError(
                f"URL {format_value(path)} leads out of its folder; write it without .."
            )
        return super()._get_local_path(path, *args, **kwargs)


PathManager.register_handler(Downloads(), allow_override=True)

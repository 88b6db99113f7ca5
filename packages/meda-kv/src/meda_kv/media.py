"""Reading images and video frames, with one clear error per bad file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from vfm_core.errors import UserError
from vfm_core.images import is_image_file, read_image

__all__ = ["load_frames", "load_images", "spread"]


def load_images(paths: Iterable[str | Path | Image.Image], where: str | None = None) -> list[Image.Image]:
    """Read images, upright and RGB.

    Parameters
    ----------
    paths : iterable of path or PIL.Image.Image
        Pictures that are open already pass through.
    where : str, optional
        The option, or file and line or sample id, that names them; put before the path in errors.

    Raises
    ------
    UserError
        For the first file that is missing, a folder, empty, corrupt, not a picture, or has no pixels.
    """
    return [_load_image(path, where) for path in paths]


def _load_image(source: str | Path | Image.Image, where: str | None) -> Image.Image:
    if isinstance(source, Image.Image):
        if 0 in source.size:
            given = f"{source.size[0]}x{source.size[1]}"
            raise UserError("a picture without pixels", where=where or "images", given=given, remedy="leave it out")
        return source.convert("RGB")
    path = Path(source).expanduser()
    named = f"{where}: {path}" if where else str(path)
    if path.is_dir():
        raise UserError("a folder, not an image", where=named, remedy="name the files in it, or give it as a video")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError("an empty file, not an image", where=named, remedy="replace it or leave it out")
    return read_image(path, name=named)


def load_frames(path: str | Path, count: int = 8, where: str | None = None) -> list[Image.Image]:
    """Read evenly spread frames of a video.

    Parameters
    ----------
    path : str or Path
        A folder of frames (in the order of their names), an animated picture, or a video file, which needs the package
        ``av``.
    count : int
        How many frames, at least 1; fewer when the video is shorter.
    where : str, optional
        As in `load_images`.

    Returns
    -------
    list of PIL.Image.Image

    Raises
    ------
    UserError
        No such file, no frame in it, or ``av`` is missing.
    """
    path = Path(path).expanduser()
    named = f"{where}: {path}" if where else str(path)
    if count < 1:
        raise UserError("a video needs at least one frame", where="--frames", given=count, remedy="use e.g. 8")
    if not path.exists():
        raise UserError("no such video", where=named, remedy="check the path")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_image_file(file))
        if not files:
            raise UserError("no frame in the folder", where=named, remedy="give a folder of pictures")
        return load_images([files[i] for i in spread(len(files), count)], where)
    if is_image_file(path):
        return _animation(path, count, named)
    return _video(path, count, named)


def spread(length: int, count: int) -> list[int]:
    """Indices of ``count`` evenly spread frames of ``length``: the middles of equal parts; all when there are fewer."""
    count = min(count, length)
    return [int((i + 0.5) * length / count) for i in range(count)]


def _animation(path: Path, count: int, named: str) -> list[Image.Image]:
    try:
        with Image.open(path) as picture:
            frames = []
            for i in spread(int(getattr(picture, "n_frames", 1)), count):
                picture.seek(i)
                frames.append(picture.convert("RGB"))
            return frames
    except (OSError, SyntaxError, EOFError) as error:
        raise UserError("unreadable picture", where=named, given=error, remedy="replace it or leave it out") from error


def _video(path: Path, count: int, named: str) -> list[Image.Image]:
    try:
        import av
    except ImportError as error:
        remedy = "pip install av, or give a folder of frames"
        raise UserError("reading a video file needs the package av", where=named, remedy=remedy) from error
    try:
        with av.open(str(path)) as container:
            total = sum(1 for _ in container.decode(video=0))
        wanted = set(spread(total, count))
        with av.open(str(path)) as container:
            frames = [f.to_image() for i, f in enumerate(container.decode(video=0)) if i in wanted]
    except (OSError, ValueError, IndexError) as error:  # av's errors derive from them
        remedy = "check the file, or give a folder of frames"
        raise UserError("unreadable video", where=named, given=error, remedy=remedy) from error
    if not frames:
        raise UserError("no frame in the video", where=named, remedy="check the file")
    return frames

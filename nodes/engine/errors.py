"""What can go wrong, as one short tree. Each message says what, which numbers, and what to do.

CogLoomError
├── UsageError            an argument that cannot be right
├── GeometryError         a size or a number of frames that the base cannot make
├── ModelError            the base
│   ├── ModelNotFound     no such name, folder or id
│   ├── NotAModel         a folder that is not a diffusers checkpoint, or a broken one
│   ├── WrongFamily       a checkpoint of another model family, or a task that this one does not do
│   ├── DownloadFailed    no network, no such repository, no access
│   ├── NotEnoughMemory   it will not fit, before or while it runs
│   └── PlacementError    a device, dtype or offload that cannot be had or combined
├── AdapterError          a LoRA file
│   ├── AdapterNotFound
│   ├── AdapterUnreadable broken, hostile, or of a kind that is not read
│   └── AdapterMismatch   made for another base
├── StackError            a stack that cannot be right, or a swap that failed (the earlier stack is active again)
├── StudyError            a study's folder that holds another one, or is broken
├── WorkflowError         a graph that cannot be run; the node's title is in the message
├── MediaError            pictures and video files
│   ├── DiskFull
│   └── Unreadable
├── TrainingError
│   ├── DatasetError
│   ├── ResumeError       a checkpoint that does not fit this run
│   └── Diverged          the loss is not a number any more
└── Cancelled             the user stopped it; not a failure
"""

from __future__ import annotations


class CogLoomError(Exception):
    """Everything that is raised on purpose. `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(CogLoomError):
    exit_code = 2


class GeometryError(UsageError):
    pass


class ModelError(CogLoomError):
    pass


class ModelNotFound(ModelError):
    pass


class NotAModel(ModelError):
    pass


class WrongFamily(ModelError):
    pass


class DownloadFailed(ModelError):
    pass


class NotEnoughMemory(ModelError):
    pass


class PlacementError(ModelError):
    pass


class AdapterError(CogLoomError):
    pass


class AdapterNotFound(AdapterError):
    pass


class AdapterUnreadable(AdapterError):
    pass


class AdapterMismatch(AdapterError):
    pass


class StackError(CogLoomError):
    pass


class StudyError(CogLoomError):
    pass


class WorkflowError(CogLoomError):
    pass


class MediaError(CogLoomError):
    pass


class DiskFull(MediaError):
    pass


class Unreadable(MediaError):
    pass


class TrainingError(CogLoomError):
    pass


class DatasetError(TrainingError):
    pass


class ResumeError(TrainingError):
    pass


class Diverged(TrainingError):
    pass


class Cancelled(CogLoomError):
    exit_code = 130

"""Everything endwise raises on purpose.

    EndwiseError
    ├── ConfigError        a recipe, an override or an argument breaks a rule
    ├── ModelError         a language model cannot be loaded, or is not one endwise can splice
    │   └── SiteError      a site does not exist in this model
    ├── DataError          a corpus is missing, empty, too short, or not what the recipe says
    │   └── NoTokenizer    text is to be read, by a model that has no tokenizer
    ├── RunFolderError     a run folder is missing or damaged, or cannot be written (the disk is full)
    │   └── FolderTaken    another process is at work in it
    ├── FormatError        a file is not the format it claims to be
    │   ├── OtherKind      what is given is no run folder, SAE or recipe, but something else; a ConfigError too
    │   └── Unreadable     the operating system does not give what it holds
    ├── EndpointError      a language model's endpoint refuses, or is gone; answers so far are kept
    ├── HubError           the Hugging Face hub does not have or give what is named, or does not take what is sent
    ├── SuiteFailed        a benchmark suite of others failed; its log is named
    └── TrainingStopped    training cannot continue; what was saved is named
        ├── NotFinite      a loss or a gradient is NaN or infinite
        ├── OutOfMemory    the device or the machine has no more; the settings to lower are named
        ├── SomeFailed     some of the SAEs trained together; it carries those that finished (in `training.members`)
        ├── Interrupted    the user asked to stop; the state is saved
        ├── ProcessLost    of several processes that train one run, another is gone
        └── ElsewhereFailed  another process failed at what all do, and says why

Every message states the rule, the value given and what to do next. The command line prints the message alone, without
a traceback, and exits with the class's `exit_code`.
"""


class EndwiseError(Exception):
    exit_code = 1


class ConfigError(EndwiseError):
    exit_code = 2


class ModelError(EndwiseError):
    exit_code = 3


class SiteError(ModelError):
    pass


class DataError(EndwiseError):
    exit_code = 4


class NoTokenizer(DataError):
    pass


class RunFolderError(EndwiseError):
    exit_code = 5


class FolderTaken(RunFolderError):
    pass


class FormatError(EndwiseError):
    exit_code = 6


class OtherKind(ConfigError, RunFolderError, FormatError):
    pass


class Unreadable(FormatError):
    """The operating system does not give what a file holds; the file itself may be whole."""


class TrainingStopped(EndwiseError):
    exit_code = 7


class EndpointError(EndwiseError):
    exit_code = 9


class HubError(EndwiseError):
    exit_code = 10


class SuiteFailed(EndwiseError):
    exit_code = 11


class Interrupted(TrainingStopped):
    exit_code = 130


class NotFinite(TrainingStopped):
    pass


class OutOfMemory(TrainingStopped):
    pass


class ProcessLost(TrainingStopped):
    pass


class ElsewhereFailed(TrainingStopped):
    def __init__(self, message: str = "It failed in another process, which says why.") -> None:
        super().__init__(message)


def out_of_memory(error: BaseException, command: str | None = None) -> OutOfMemory | None:
    """An allocation's failure as an error that says what to do; None for any other error.

    Args:
        command: what resumes the run in less memory.
    """
    text = " ".join(str(error).split())
    if not (isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text):
        return None
    return OutOfMemory(
        f"Out of memory ({text[:200] or 'MemoryError'}). Lower training.microbatch (the spliced pass, which e2e spends "
        "most on) or raise training.accumulation (all activations), neither of which changes what is learnt. A new "
        "run may also have a smaller training.batch or dictionary.size, or fewer SAEs that train together. endwise "
        "plan shows what takes memory." + (f" Resume this one with `{command}`." if command else "")
    )

"""Everything endwise raises on purpose.

    EndwiseError
    ├── ConfigError        a recipe, an override or an argument breaks a rule
    ├── ModelError         a language model cannot be loaded, or is not one endwise can splice
    │   └── SiteError      a site does not exist in this model
    ├── DataError          a corpus is missing, empty, too short, or not what the recipe says
    ├── RunFolderError     a run folder is missing, taken or damaged, or cannot be written (the disk is full)
    ├── FormatError        a file is not the format it claims to be
    └── TrainingStopped    training cannot go on (a loss is not finite); what was saved is named
        ├── SomeFailed     some of the SAEs trained together; it carries those that finished (in `group`)
        └── Interrupted    the user asked to stop; the state is saved

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


class RunFolderError(EndwiseError):
    exit_code = 5


class FormatError(EndwiseError):
    exit_code = 6


class TrainingStopped(EndwiseError):
    exit_code = 7


class Interrupted(TrainingStopped):
    exit_code = 130

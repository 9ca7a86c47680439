"""Generation-based evaluation of one or several models: `papertrl evaluate`."""

from .measure import Answered, measures, table
from .models import Loaded, load_model
from .sampling import complete, completion_logps

__all__ = ["Answered", "Loaded", "complete", "completion_logps", "load_model", "measures", "table"]

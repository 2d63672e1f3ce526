"""Files as people keep them: one reader of conversations, one of tables, for every command.

from personatlas.persona.formats import read_conversations, read_table
"""

from personatlas.persona.formats.conversations import (
    Columns,
    Conversation,
    Exclusions,
    Message,
    NotUsable,
    find_conversations,
    read_conversations,
    read_messages,
    row_messages,
)
from personatlas.persona.formats.tables import (
    Placed,
    find_column,
    read_json_value,
    read_records,
    read_table,
    read_text,
    require_file,
    require_unicode,
)

__all__ = [
    "Columns",
    "Conversation",
    "Exclusions",
    "Message",
    "NotUsable",
    "Placed",
    "find_column",
    "find_conversations",
    "read_conversations",
    "read_json_value",
    "read_messages",
    "read_records",
    "read_table",
    "read_text",
    "require_file",
    "require_unicode",
    "row_messages",
]

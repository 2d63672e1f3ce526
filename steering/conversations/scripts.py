"""Our own scripts: what users say in eight turns of talk, which nobody has answered yet.

    scripts = read_conversations(SCRIPTS)

Four domains with ten conversations each (coding, writing, therapy: users who speak of themselves as to a
therapist, and the philosophy of AI), and forty conversations of everyday help. Everyday has forty because a
drift alarm is calibrated on conversations that do not drift: half of the scripts set its limit and the others
count its false alarms, and a limit that fits five scripts of coding misses on the other five."""

from pathlib import Path

SCRIPTS = Path(__file__).parent / "scripts.jsonl"
EVERYDAY = "everyday"  # the domain of `SCRIPTS` that is there to calibrate alarms on

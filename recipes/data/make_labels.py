"""Write the labelled texts that recipes of this repository learn: entities.conll, intents.csv and chats.jsonl.

    python recipes/data/make_labels.py

Sentences are made of patterns and lists, drawn by a seed: enough to show a road and to test it, and no measure of
quality.
"""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
NUM_SENTENCES, NUM_QUESTIONS, NUM_CHATS = 900, 900, 400

FIRST = [
    "Ada",
    "Alan",
    "Barbara",
    "Claude",
    "Donald",
    "Edith",
    "Frances",
    "Grace",
    "Hedy",
    "Ivan",
    "Jean",
    "John",
    "Karen",
    "Katherine",
    "Leslie",
    "Linus",
    "Margaret",
    "Mary",
    "Niklaus",
    "Radia",
    "Richard",
    "Robin",
    "Shafi",
    "Sophie",
    "Tim",
    "Tony",
    "Vera",
    "Yann",
]
LAST = [
    "Allen",
    "Backus",
    "Clarke",
    "Dijkstra",
    "Engelbart",
    "Floyd",
    "Goldwasser",
    "Hamilton",
    "Hoare",
    "Hopper",
    "Iverson",
    "Johnson",
    "Kay",
    "Knuth",
    "Lamport",
    "Liskov",
    "Lovelace",
    "McCarthy",
    "Milner",
    "Minsky",
    "Naur",
    "Perlis",
    "Perlman",
    "Rabin",
    "Ritchie",
    "Shannon",
    "Turing",
    "Wilson",
    "Wirth",
]
PLACES = [
    "Athens",
    "Bergen",
    "Bologna",
    "Boston",
    "Cairo",
    "Cambridge",
    "Delft",
    "Dublin",
    "Geneva",
    "Hamburg",
    "Helsinki",
    "Istanbul",
    "Kyoto",
    "Lisbon",
    "London",
    "Lyon",
    "Manchester",
    "Montreal",
    "Nairobi",
    "Oslo",
    "Oxford",
    "Porto",
    "Prague",
    "Quito",
    "Rome",
    "Santiago",
    "Turin",
    "Vienna",
    "Warsaw",
    "Zurich",
]
GROUPS = [
    "Acme Analytics",
    "Blue Harbour",
    "Cedar Works",
    "Delta Press",
    "Evergreen Bank",
    "Falcon Motors",
    "Granite Labs",
    "Harbour Group",
    "Iris Systems",
    "Juniper House",
    "Kestrel Air",
    "Lantern Books",
    "Meridian Health",
    "Northern Rail",
    "Orchard Foods",
    "Pioneer Glass",
    "Quarry Stone",
    "Riverside Clinic",
    "Summit Energy",
    "Tern Software",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SENTENCES = (
    "{PER} moved from {LOC} to {LOC} in spring .",
    "{ORG} hired {PER} on {day} .",
    "The office of {ORG} in {LOC} is closed on {day} .",
    "On {day} {PER} met {PER} at {ORG} .",
    "{PER} of {ORG} will speak in {LOC} .",
    "Nobody in {LOC} had heard of {ORG} before .",
    "A letter from {PER} reached {LOC} on {day} .",
    "{ORG} and {ORG} opened a shop in {LOC} .",
    "It rained on {day} and the train was late .",
    "Please call {PER} when you are in {LOC} .",
    "{LOC} is twice as large as {LOC} , said {PER} .",
    "The report by {ORG} was written last {day} .",
    "Most of the work was done before {day} .",
    "{PER} left {ORG} and founded {ORG} .",
)
QUESTIONS = {
    "card_lost": (
        "I lost my card {when}",
        "my card is gone, what now",
        "someone took my card {when}",
        "please block the card that I lost",
    ),
    "card_arrival": (
        "when does my new card arrive",
        "my card was sent {when} and is not here",
        "how long does a card take to {LOC}",
        "I am still waiting for my card",
    ),
    "balance": (
        "how much money do I have",
        "what is the balance of my {account} account",
        "show me the balance from {when}",
        "is there anything left in my account",
    ),
    "transfer": (
        "send {amount} to {PER}",
        "transfer {amount} from my {account} account",
        "I want to pay {PER} {amount} {when}",
        "move {amount} to {ORG}",
    ),
    "transfer_failed": (
        "my transfer to {PER} failed",
        "why was the payment of {amount} declined",
        "the money I sent {when} came back",
        "{ORG} did not get my {amount}",
    ),
    "exchange": (
        "what is the exchange rate in {LOC}",
        "how many euros are {amount}",
        "can I hold another currency",
        "change {amount} before I travel to {LOC}",
    ),
    "cash": (
        "where can I get cash in {LOC}",
        "the machine in {LOC} gave me no money",
        "how much cash can I take out {when}",
        "is there a fee for cash",
    ),
    "password": (
        "I forgot my password",
        "how do I change my password",
        "the code did not come {when}",
        "I cannot log in since {when}",
    ),
    "close_account": (
        "close my {account} account",
        "I want to leave the bank",
        "please delete everything about me",
        "how do I end my contract {when}",
    ),
}
OPENINGS = ("", "", "", "hello, ", "hi there, ", "please help: ", "sorry, but ", "good morning, ", "one question: ")
ENDINGS = ("", "", "", "?", ".", " please", " thanks", ", thank you", "!")
WHEN = ("yesterday", "today", "last week", "on Monday", "on Friday", "this morning", "two days ago", "in June")
ACCOUNTS = ("savings", "joint", "main", "business", "student")


def fill(pattern: str, draw: random.Random) -> list[tuple[str, str]]:
    """Words of a pattern with their tags."""
    found = []
    for word in pattern.split():
        slot = re.fullmatch(r"\{(\w+)\}", word)
        if slot is None:
            found.append((word, "O"))
        elif slot[1] == "day":
            found.append((draw.choice(DAYS), "O"))
        else:
            names = {"PER": f"{draw.choice(FIRST)} {draw.choice(LAST)}", "LOC": draw.choice(PLACES)}
            words = names.get(slot[1], draw.choice(GROUPS)).split()
            found += [(each, f"{'I' if place else 'B'}-{slot[1]}") for place, each in enumerate(words)]
    return found


def ask(pattern: str, draw: random.Random) -> str:
    """A question of a pattern."""
    text = pattern.format(
        PER=f"{draw.choice(FIRST)} {draw.choice(LAST)}",
        LOC=draw.choice(PLACES),
        ORG=draw.choice(GROUPS),
        when=draw.choice(WHEN),
        amount=f"{draw.randint(2, 90) * 5} {draw.choice(('dollars', 'pounds', 'francs'))}",
        account=draw.choice(ACCOUNTS),
    )
    return draw.choice(OPENINGS) + text + draw.choice(ENDINGS)


def chat(draw: random.Random) -> list[dict[str, str]]:
    """A short conversation: a sum in words, and a second one."""
    turns = []
    for _ in range(draw.randint(1, 2)):
        first, second = draw.randint(2, 40), draw.randint(2, 40)
        name, thing = draw.choice(FIRST), draw.choice(("books", "apples", "coins", "letters"))
        question = f"{name} has {first} {thing} and gets {second} more. How many {thing} has {name} now?"
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{first} + {second} = {first + second}, so {name} has {first + second}."},
        ]
    return turns


def main() -> None:
    """Write all three files."""
    draw = random.Random(0)
    texts = [fill(draw.choice(SENTENCES), draw) for _ in range(NUM_SENTENCES)]
    conll = "\n".join("".join(f"{word}\t{tag}\n" for word, tag in text) for text in texts)
    (HERE / "entities.conll").write_text(conll, encoding="utf-8")
    with (HERE / "intents.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("text", "label"))
        for _ in range(NUM_QUESTIONS):
            label = draw.choice(list(QUESTIONS))
            rows.writerow((ask(draw.choice(QUESTIONS[label]), draw), label))
    chats = (json.dumps({"messages": chat(draw)}) for _ in range(NUM_CHATS))
    (HERE / "chats.jsonl").write_text("\n".join(chats) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""texts.jsonl into train.jsonl (demonstrations) and heldout.jsonl (token ids): of the draws for each thing every eighth is held out."""

import json

with open("train.jsonl", "w") as train, open("heldout.jsonl", "w") as heldout:
    asks = {json.loads(line)["id"]: json.loads(line)["messages"] for line in open("prompts.jsonl")}
    for line in open("texts.jsonl"):
        drawn = json.loads(line)
        if drawn["finish_reason"] != "stop" or not drawn["text"].strip():
            continue
        if drawn["sample"] % 8 == 7:
            ids = {"input_ids": drawn["input_ids"] + drawn["output_ids"], "completion": len(drawn["output_ids"])}
            heldout.write(json.dumps(ids) + "\n")
        else:
            train.write(json.dumps({"messages": asks[drawn["id"]], "completion": drawn["text"]}) + "\n")

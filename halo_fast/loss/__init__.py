"""Gran-DPO and its neighbours: the public calls, objectives, operators and backends."""

"""服务：成批的引擎与 OpenAI 相容的 HTTP 接口。"""

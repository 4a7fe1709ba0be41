"""把模型切开的几种并行，各是一条轴；读法：way -> layout -> 各种。

| 文件     | 轴       | 切什么           |
|----------|----------|------------------|
| context  | context  | 一行里的词元     |
| tensor   | tensor   | 头、宽度、词表   |
| experts  | expert   | 专家             |
| pipeline | pipeline | 层               |
"""

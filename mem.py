import torch,resource; torch.set_num_threads(1)
from headwise import freed_memory as f
def rss(): 
    return int(open('/proc/self/statm').read().split()[1])*4//1024
def peak():
    x=[torch.ones(4*2**20) for _ in range(50)]   # 50 x 16 MB
    del x
print('start',rss()); peak(); print('outside, freed',rss())
with f.kept():
    peak(); print('inside, freed',rss())
print('after block',rss())
torch.ones(3000); print('after a 12 kB tensor',rss())
torch.ones(200000); print('after a 800 kB tensor',rss())
with f.kept():
    x=[torch.ones(4*2**20) for _ in range(50)]; pin=torch.ones(10); del x
print('with a small survivor on top',rss()); torch.ones(2*10**6); print(rss())

import time, random, torch
torch.set_num_threads(1)
from types import SimpleNamespace as N
from headwise.sweep.measuring import chunks_of
class S:
    def __init__(s, w): s.items=tuple(N(prompt=(0,)*(x-1),answer=(0,)) for x in w)
    def __len__(s): return len(s.items)
def old(items,budget):
    order = sorted(range(len(items)), key=lambda i: (len(items.items[i].prompt), i)); chunk=[]
    for p in order:
        width=max(len(items.items[i].prompt)+len(items.items[i].answer) for i in [*chunk,p])
        if chunk and (len(chunk)+1)*width>budget:
            yield chunk,tuple(items.items[i] for i in chunk); chunk=[]
        chunk.append(p)
    yield chunk,tuple(items.items[i] for i in chunk)
def cost(chunks,budget,blocks,per):  # forwards, tokens; sets only share within a block
    f=t=0
    for c,it in chunks:
        tok=len(c)*max(len(i.prompt)+1 for i in it); tog=max(1,budget//tok)
        k=-(-per//tog); f+=1+blocks*k; t+=tok*(1+blocks*per)
    return len(chunks),f,t
r=random.Random(0)
w=[r.randint(20,60) for _ in range(64)]
for budget in (1024,8192):
  for blocks,per in ((12,12),(4,4),(24,16),(12,4)):
    s=blocks*per; it=S(w)
    print('budget',budget,'blocks',blocks,'heads',per,'old',cost(list(old(it,budget)),budget,blocks,per),'new',cost(list(chunks_of(it,budget,s)),budget,blocks,per))
  lay={n:tuple(tuple(sorted(c)) for c,_ in chunks_of(S(w),budget,n)) for n in (0,1,5,7,21,51,144)}
  first=lay[144]
  print('layouts', {n:len(l) for n,l in lay.items()}, 'chunks in common with the map', {n:len(set(l)&set(first)) for n,l in lay.items()})
for n,b,mean in ((1000,1024,20),(1000,8192,10),(3000,8192,10),(2000,8192,30)):
    w=[max(3,int(r.gauss(mean,mean/4))) for _ in range(n)]
    t=time.time(); k=len(list(chunks_of(S(w),b,20))); print('time',n,b,mean,k,round(time.time()-t,2))

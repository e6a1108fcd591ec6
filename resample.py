import time, torch; torch.set_num_threads(1)
import headwise as hw
from headwise.heads import HeadSet
from headwise.probes import encode, probe
from headwise.sweep import KnockOut, measure_sets, clean_runs
from headwise.sweep.knockout import reference_of
from headwise.sweep.clean_runs import remembered
import headwise.sweep.measuring as M
from headwise.zoo.planted import planted
o=planted("llama-gqa",layers=4,heads=4,circuits=("induction",),seed=0)
m=hw.attach(o.model.double(),o.tokenizer,example=o.example)
items=encode(probe("repeat").over(words=(4,10)),m.tokenizer,n=24)
print(sorted(len(e.prompt) for e in items))
ref=reference_of(m,encode(probe("repeat").over(words=(4,10)),m.tokenizer,n=8,seed=1))
A=HeadSet.parse("L2H1"); allh=[HeadSet.parse(f"L{l}H{h}") for l in range(4) for h in range(4)]
heads=[HeadSet.parse(f"L1H0,L1H1,L2H0,L2H1")]
k=KnockOut("resample",reference=ref)
for s in (heads[0],):
    alone=measure_sets(m,items,[s],k)[0]; among=measure_sets(m,items,[s,*allh],k)[0]
    print('resample', alone.mean().item(), among.mean().item(), (alone-among).abs().max().item(), int(((alone-among).abs()>1e-9).sum()),'of',len(items))
    # old layout: sets ignored
    orig=M.chunks_of; M.chunks_of=lambda i,b,sets=0: orig(i,b,0)
    alone=measure_sets(m,items,[s],k)[0]; among=measure_sets(m,items,[s,*allh],k)[0]
    print('layout independent of sets', (alone-among).abs().max().item()); M.chunks_of=orig
calls=[0,0]
cr=M.clean_run
def counted(items_,of,run):
    calls[0]+=1
    def r(): calls[1]+=1; return run()
    return cr(items_,of,r)
M.clean_run=counted
with remembered():
    for n,sets in (('map',allh),('joint',allh[:5]*4+heads),('dose',heads),('dose2',heads),('growing',allh[:6])):
        calls[:]=[0,0]; measure_sets(m,items,sets,KnockOut()); print(n,len(sets),'clean runs asked',calls[0],'run',calls[1])

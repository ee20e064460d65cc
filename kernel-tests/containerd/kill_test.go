package containerd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/internal/failpoint"
)

// Who is killed.
const (
	killSnapshotter = "snapshotter"
	killWorker      = "worker"
	killKeeper      = "keeper"
	killDaemon      = "keeper and worker"
	killContainerd  = "containerd"
)

// A place is a named one in the snapshotter.
type place struct {
	name string
	hits int // a round comes by as often at least
	way  way
}

// A way leads the snapshotter to a place.
type way int

const (
	byLife     way = iota // an image is pulled, run and removed, while a container of another one waits
	byStart               // it is there when the snapshotter starts
	byNoDaemon            // the same, without a daemon
	byDeath               // the daemon's worker dies
	byLost                // the daemon is gone, and what it has mounted keeps another from starting
)

// places are those of the snapshotter and its service. A name that is not known here has the
// default: it is hit where an image lives.
func places() (list []place) {
	special := map[string]place{
		"snapshotter.labels": {hits: 2}, "snapshotter.directory": {hits: 3}, "snapshotter.place": {hits: 3}, "snapshotter.placed": {hits: 3},
		"snapshotter.created": {hits: 2}, "snapshotter.prepared": {hits: 2}, "snapshotter.remove": {hits: 3}, "snapshotter.removed": {hits: 3},
		"snapshotter.trash": {hits: 3}, "snapshotter.trashed": {hits: 3}, "snapshotter.delete": {hits: 3}, "snapshotter.deleted": {hits: 3},
		"snapshotter.bind": {hits: 2}, "snapshotter.bound": {hits: 2}, // recovery of the other image is the first
		"snapshotter.opened": {way: byStart}, "snapshotter.tidied": {way: byStart}, "snapshotter.recover": {way: byStart}, "snapshotter.recovered": {way: byStart},
		"snapshotter.abandon": {way: byLost}, "snapshotter.abandoned": {way: byLost},
		"grpc.listens": {way: byStart}, "grpc.ready": {way: byStart}, "grpc.daemon.answers": {way: byStart},
		"grpc.daemon.start": {way: byNoDaemon}, "grpc.daemon.started": {way: byNoDaemon}, "grpc.daemon.ended": {way: byDeath},
	}
	for _, name := range failpoint.Names {
		if pkg, _, _ := strings.Cut(name, "."); pkg != "snapshotter" && pkg != "grpc" {
			continue
		}
		p := special[name]
		p.name, p.hits = name, max(1, p.hits)
		list = append(list, p)
	}
	return list
}

// victims are who is killed at a place in round number n: the snapshotter itself, and one of
// the others, while it is held there.
func (p place) victims(n int) []string {
	others := []string{killWorker, killContainerd, killKeeper, killDaemon}
	if p.name == "" {
		return append(others, killSnapshotter)
	}
	if p.way == byNoDaemon || p.way == byLost || p.way == byDeath {
		others = []string{killContainerd} // nothing else is there
	}
	return []string{killSnapshotter, others[n%len(others)]}
}

// TestKillMatrix kills the snapshotter at each of its named places, and erofsd's worker and
// keeper, and containerd, while it is held there, and all of them at any moment. With ROUNDS=4
// each of them is killed at each place.
func TestKillMatrix(t *testing.T) {
	w := newWorld(t)
	// Its layers lie on another one, so that all of the image that comes and goes does so.
	program, files := w.app(t)
	w.other = w.addr + "/apart:lazy"
	w.convert(t, imageOf(t, ocispec.ImageConfig{}, layerWith(t, "other", "another image"), program, files).layout(t), w.other)
	w.bin = filepath.Join(w.dir, "killed")
	w.build(t, w.bin+"/", "./cmd/erofsd")
	w.build(t, w.bin+"/", "-tags=failpoint", "./cmd/containerd-erofsd-grpc")
	script := filepath.Join(w.dir, "script")
	t.Setenv("EROFSD_FAILPOINT", "@"+script)
	seed, rounds := seedAndRounds(t)
	for i, p := range append(places(), place{}) {
		t.Run(cmp.Or(p.name, "moments"), func(t *testing.T) {
			if err := os.WriteFile(script, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			k := &killed{node: w.start(t), place: p, script: script, rnd: rand.New(rand.NewPCG(seed, uint64(i)))}
			ctx := in(t, "default")
			k.begin(ctx, t)
			for round := range rounds {
				for _, victim := range p.victims(round + i + int(seed%8)) {
					t.Run(victim, func(t *testing.T) { k.round(in(t, "default"), t, victim) })
				}
			}
			k.remove(ctx, t, w.other)
			k.empty(ctx, t)
		})
	}
}

// seedAndRounds are $SEED, or a new one, and $ROUNDS, or 1.
func seedAndRounds(t *testing.T) (seed uint64, rounds int) {
	t.Helper()
	seed, rounds = rand.Uint64(), 1
	for name, value := range map[string]any{"SEED": &seed, "ROUNDS": &rounds} {
		if s := os.Getenv(name); s != "" {
			if _, err := fmt.Sscan(s, value); err != nil {
				t.Fatalf("%s is %q: %v", name, s, err)
			}
		}
	}
	t.Logf("SEED=%d ROUNDS=%d", seed, rounds)
	return seed, rounds
}

// A killed is a node whose snapshotter comes to a place.
type killed struct {
	*node
	place
	script string
	rnd    *rand.Rand
	count  int

	other  client.Image // is there all the time
	layers int          // of other
	top    string       // the last of them
}

// begin pulls the other image and has it mounted where a daemon stays, with nothing read of its data.
func (k *killed) begin(ctx context.Context, t *testing.T) {
	t.Helper()
	k.other = k.pull(ctx, t, k.w.other, false)
	diffs, err := k.other.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	k.layers, k.top = len(diffs), identity.ChainID(diffs).String()
	if k.way == byNoDaemon {
		return // a guard would keep the next daemon from starting
	}
	c, err := k.run(ctx, k.other, fmt.Sprint("mounts-", k.count), true)
	if err != nil {
		t.Fatal(err)
	}
	<-c.output.lines
	_, err = c.task.Delete(ctx, client.WithProcessKill)
	if err = errors.Join(err, c.input.Close(), c.Delete(ctx, client.WithSnapshotCleanup)); err != nil {
		t.Fatal(err)
	}
}

// round kills victim at the place, has it started again, and looks at what is left.
func (k *killed) round(ctx context.Context, t *testing.T, victim string) {
	k.count++
	id := fmt.Sprint("life-", k.count)
	witness := k.witness(ctx, t)
	script, state := "", byte(0)
	if k.name != "" {
		action := "stop"
		if state = 'T'; victim == killSnapshotter {
			action, state = "kill", 'Z'
		}
		script = fmt.Sprintf("%s=%s@%d", k.name, action, 1+k.rnd.IntN(k.hits))
	}
	moment := time.Duration(k.rnd.IntN(1500)) * time.Millisecond // where there is no place, any will do
	t.Log(cmp.Or(script, "after "+moment.String()))
	pid := k.arm(t, script)
	held := func() error { return inState(pid, state) }
	ended := k.bring(ctx, t, id, held)
	if k.name == "" {
		time.Sleep(moment)
	} else {
		k.await(t, "the snapshotter comes to "+k.name, held)
	}
	k.kill(ctx, t, victim, pid)
	k.reconnected(ctx, t)
	err := <-ended
	switch {
	case errors.Is(err, errWrong):
		t.Error(err)
	case err != nil && (victim == killWorker || victim == killKeeper) && !isStale(err):
		t.Errorf("what went on: %v", err)
	case err != nil:
		t.Logf("what went on: %v", err)
	}
	k.dismiss(ctx, t, witness, victim)
	if victim == killKeeper { // the worker serves on; the next one has a keeper again
		k.replaceWorker(ctx, t)
	}
	k.discard(ctx, t, id)
	k.remove(ctx, t, k.w.lazy)
	k.only(ctx, t)
	if err := k.life(ctx, k.w.lazy, id+"-again"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	k.only(ctx, t)
}

// isStale reports whether containerd has no connection to the snapshotter: it found out with
// this call that the one which arm has ended is gone, or the next one was stopped before it
// could answer. What the snapshotter says itself is about an image.
func isStale(err error) bool {
	return strings.Contains(err.Error(), ": unavailable") && !strings.Contains(err.Error(), "mount image")
}

// witness starts a container of the other image, which reads when all is over. Where no daemon
// may be there, there is none: a guard would keep another one from starting.
func (k *killed) witness(ctx context.Context, t *testing.T) *container {
	t.Helper()
	if k.way == byNoDaemon || k.way == byLost {
		return nil
	}
	c, err := k.run(ctx, k.other, fmt.Sprint("witness-", k.count), true)
	if err != nil {
		t.Fatal(err)
	}
	<-c.output.lines
	return c
}

// dismiss lets the witness read. Only of a daemon that is gone as a whole it gets errors.
func (k *killed) dismiss(ctx context.Context, t *testing.T, c *container, victim string) {
	t.Helper()
	if c == nil {
		return
	}
	if victim == killContainerd {
		var err error
		if c.exit, err = c.task.Wait(ctx); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.finish(ctx)
	switch {
	case err == nil && got == "waits\n"+k.w.want:
	case victim == killDaemon && err != nil: // reads failed; wrong bytes would be another digest, and no error
	default:
		t.Errorf("the container that ran all the time printed %q, %v", got, err)
	}
}

// arm starts the snapshotter, which was killed or stopped before, with what it shall do.
func (k *killed) arm(t *testing.T, script string) (pid int) {
	t.Helper()
	ctx := in(t, "default")
	if k.way == byLost && k.count > 1 { // what has been read is served by nobody
		k.remove(ctx, t, k.w.other)
		k.empty(ctx, t)
		k.begin(ctx, t)
	}
	if k.rnd.IntN(2) == 0 {
		k.snapshotter.Stop()
	} else {
		k.snapshotter.Kill()
	}
	if k.way == byNoDaemon || k.way == byLost {
		k.killDaemon(ctx, t)
	}
	if err := os.WriteFile(k.script, []byte(script+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return k.snapshotter.Begin(t)
}

// bring does what brings the snapshotter to the place.
func (k *killed) bring(ctx context.Context, t *testing.T, id string, held func() error) <-chan error {
	t.Helper()
	ended := make(chan error, 1)
	if k.way == byDeath || k.way == byLife {
		k.await(t, "the snapshotter answers", func() error { return k.reached(ctx, held) })
	}
	switch k.way {
	case byDeath:
		if err := syscall.Kill(k.worker(ctx, t), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ended <- nil
	case byLife:
		go func() { ended <- errors.Join(k.label(ctx), k.life(ctx, k.w.lazy, id)) }()
	default:
		ended <- nil
	}
	return ended
}

// reached asks the snapshotter, unless it is held already, for something that does not bring it
// to any place.
func (k *killed) reached(ctx context.Context, held func() error) error {
	if held() == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := k.SnapshotService(snapshotterName).Usage(ctx, k.top)
	return err
}

// label changes a label of a layer, which containerd passes on.
func (k *killed) label(ctx context.Context) error {
	info := snapshots.Info{Name: k.top, Labels: map[string]string{"containerd.io/snapshot/round": fmt.Sprint(k.count)}}
	_, err := k.SnapshotService(snapshotterName).Update(ctx, info, "labels.containerd.io/snapshot/round")
	return err
}

// kill kills victim while the snapshotter, process pid, is held at the place, and starts again
// what nobody else starts.
func (k *killed) kill(ctx context.Context, t *testing.T, victim string, pid int) {
	t.Helper()
	switch victim {
	case killSnapshotter:
		k.snapshotter.Kill() // it has ended
		k.snapshotter.Start(t)
		return
	case killWorker:
		k.signal(t, k.worker(ctx, t), syscall.SIGKILL)
	case killKeeper:
		keeper, err := parentOf(k.worker(ctx, t))
		if err != nil || keeper <= 1 {
			t.Fatalf("the keeper is %d, %v", keeper, err)
		}
		k.signal(t, keeper, syscall.SIGKILL)
	case killDaemon:
		k.killDaemon(ctx, t)
	case killContainerd:
		k.containerd.Kill()
		k.containerd.Start(t)
	}
	k.signal(t, pid, syscall.SIGCONT)
}

func (k *killed) signal(t *testing.T, pid int, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, s); err != nil {
		t.Fatalf("send %v to process %d: %v", s, pid, err)
	}
}

// replaceWorker ends a worker that has no keeper: the snapshotter starts another daemon.
func (k *killed) replaceWorker(ctx context.Context, t *testing.T) {
	t.Helper()
	old := k.worker(ctx, t)
	k.signal(t, old, syscall.SIGTERM)
	k.await(t, "another daemon is started", func() error {
		if k.worker(ctx, t) == old {
			return errors.New("it is the old one")
		}
		return nil
	})
}

// discard removes what is left of a container.
func (k *killed) discard(ctx context.Context, t *testing.T, id string) {
	t.Helper()
	c, err := k.LoadContainer(ctx, id)
	if err != nil {
		return // nothing is
	}
	if task, err := c.Task(ctx, nil); err == nil {
		if _, err := task.Delete(ctx, client.WithProcessKill); err != nil {
			t.Log(err)
		}
	}
	if err := c.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		t.Log(err)
	}
}

// only waits until there is nothing but the other image: no snapshot, no directory, no mount, no
// image in the daemon, no process.
func (k *killed) only(ctx context.Context, t *testing.T) {
	t.Helper()
	k.dropLeases(ctx, t)
	k.await(t, "everything of the round goes", func() error {
		return errors.Join(k.snapshotsLeft(ctx), k.filesLeft(), k.imagesLeft(ctx), k.processesLeft())
	})
}

// dropLeases drops the leases of pulls whose containerd was killed, which live for a day.
func (k *killed) dropLeases(ctx context.Context, t *testing.T) {
	t.Helper()
	list, err := k.LeasesService().List(ctx)
	for _, l := range list {
		err = errors.Join(err, k.LeasesService().Delete(ctx, l))
	}
	if err != nil {
		t.Error(err)
	}
	k.collect(ctx, t)
}

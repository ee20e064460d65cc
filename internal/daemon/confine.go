package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/failpoint"
	"github.com/erofsd/erofsd/internal/sandbox"
)

// Values of Options.Sandbox.
const (
	SandboxAuto   = "auto"   // what this kernel has
	SandboxStrict = "strict" // all of it, or the daemon does not start
	SandboxOff    = "off"
)

// A confinement is the sandbox that this process enters before it reads anything of an
// image, and the process that does for it what cannot be done from inside. Nil is none.
type confinement struct {
	mounts *mounterProcess
	mode   string
	user   *sandbox.User  // who this process becomes; nil: nobody else
	report sandbox.Report // set before the API is served
}

// newConfinement prepares the sandbox that o asks for: it starts the mounter, while this
// process holds nothing of the kernel.
func newConfinement(o Options) (*confinement, error) {
	switch o.Sandbox {
	case "", SandboxOff:
		return nil, nil
	case SandboxAuto, SandboxStrict:
	default:
		return nil, fmt.Errorf("unknown sandbox %q: want %s, %s or %s", o.Sandbox, SandboxAuto, SandboxStrict, SandboxOff)
	}
	if o.User != "" && o.Nydusd.Supervisor != "" {
		return nil, errors.New("sandbox: --user does not go with --supervisor: what is taken over there needs root to be opened")
	}
	c := &confinement{mode: o.Sandbox}
	if err := c.judge(sandbox.Probe()); err != nil {
		return nil, err
	}
	var err error
	if c.user, err = findUser(o.User); err != nil {
		return nil, err
	}
	c.mounts, err = startMounter(filepath.Join(o.Root, "images"), o.MountBelow...)
	return c, err
}

// judge returns why a strict sandbox cannot be.
func (c *confinement) judge(r sandbox.Report) error {
	if c.mode == SandboxStrict && !r.Complete() {
		return fmt.Errorf("sandbox: strict, but this machine has not all of it (%s); take --sandbox=auto, which does what it can", r)
	}
	return nil
}

// mounter is who mounts the images in a directory for this process.
func (c *confinement) mounter(images string) Mounter {
	if c == nil {
		return helperMounter{run: runHere(images)}
	}
	return helperMounter{run: c.mounts.run}
}

// enter is the end of what this process could do and need not.
func (c *confinement) enter(o Options, socket string) (err error) {
	options := sandbox.Options{
		// Images are read from wherever they are, whoever's they are.
		Capabilities: []int{unix.CAP_DAC_READ_SEARCH},
		Writable:     o.ownDirs(), UnixSockets: o.usesSockets(), User: c.user,
	}
	if o.Nydusd.Supervisor != "" { // a takeover, later, locks it
		options.Writable = []string{o.Root}
	}
	for _, dir := range o.Writable {
		if _, err := os.Stat(dir); err == nil {
			options.Writable = append(options.Writable, dir)
		}
	}
	if socket != "" {
		options.Removable = []string{filepath.Dir(socket)}
	}
	if _, err := os.Stat(o.cacheDir()); err == nil { // what cachefiles has left (left.go)
		options.Removable = append(options.Removable, o.cacheDir())
	}
	for _, dir := range o.ownDirs() { // with a takeover to come nobody has made them yet
		if err := privateDir(dir); err != nil {
			return err
		}
	}
	if err := c.give(o); err != nil {
		return err
	}
	if c.report, err = sandbox.Enter(options); err != nil {
		return fmt.Errorf("enter the sandbox: %w (--sandbox=off does without it)", err)
	}
	return c.judge(c.report)
}

// usesSockets reports whether the daemon will connect to unix sockets: of a backend, a
// supervisor, or a service manager.
func (o Options) usesSockets() bool {
	p := o.Default.Backend.HTTPProxy
	return o.UnixSockets || o.Nydusd.Supervisor != "" || os.Getenv("NOTIFY_SOCKET") != "" || p != nil && filepath.IsAbs(p.Addr)
}

// shown is what the API says of the sandbox.
func (c *confinement) shown() api.Sandbox {
	if c == nil {
		return api.Sandbox{Mode: SandboxOff, Holds: []string{}, Lacks: []string{}}
	}
	return api.Sandbox{Mode: c.mode, Holds: append([]string{}, c.report.Holds...), Lacks: append([]string{}, c.report.Lacks...)}
}

// close ends the mounter.
func (c *confinement) close() error {
	if c == nil {
		return nil
	}
	return c.mounts.close()
}

// confine enters the sandbox, in which everything from outside is read, and watches the
// mounter until ctx is done.
func (c *Control) confine(ctx context.Context, socket string) error {
	f := c.o.confinement
	if f == nil {
		return nil
	}
	if err := c.usable(f); err != nil {
		return err
	}
	failpoint.Hit("daemon.takeover.sandbox") // a script is read at the first hit: later it is out of reach
	if err := f.enter(c.o, socket); err != nil {
		return err
	}
	failpoint.Hit("daemon.takeover.sandboxed")
	level := slog.LevelInfo
	if !f.report.Complete() {
		level = slog.LevelWarn
	}
	c.log.Log(ctx, level, "sandbox: "+f.report.String())
	go func() {
		select {
		case <-f.mounts.gone:
			c.replaceMounter(ctx)
		case <-ctx.Done():
		}
	}()
	return nil
}

// usable refuses to become a user who could not do what has to be done to the kernel's
// cache: look into it, cull, and take names away that a new chunk table makes wrong.
func (c *Control) usable(f *confinement) error {
	if f.user == nil {
		return nil
	}
	if d, err := c.running(); err == nil && d.kernel.name() == Cachefiles {
		return errors.New("sandbox: another user cannot serve cachefiles, whose directory is root's: leave --user out, or take fanotify")
	}
	if dir := c.o.cacheDir(); exists(dir) {
		return fmt.Errorf("sandbox: %s has what cachefiles has kept, with which another user cannot do anything: remove it, or leave --user out", dir)
	}
	return nil
}

// replaceMounter has a successor of this worker go on, with a mounter of its own: from
// inside the sandbox none can be started.
func (c *Control) replaceMounter(ctx context.Context) {
	if ctx.Err() != nil {
		return // it was ended
	}
	c.log.Error("the process that mounts died; images are served on")
	d, err := c.running()
	if err == nil {
		err = d.succeed(ctx)
	}
	if err != nil && ctx.Err() == nil {
		c.log.Error("nothing can be mounted or unmounted until the daemon is restarted", "err", err)
	}
}

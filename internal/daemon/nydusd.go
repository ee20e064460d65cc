package daemon

import (
	"context"
	"runtime"

	"github.com/erofsd/erofsd/internal/api/nydus"
)

// Info is the daemon at this moment.
func (c *Control) Info() nydus.DaemonInfo {
	v := BuildVersion()
	info := nydus.DaemonInfo{Version: nydus.Version{
		Package: v.Version, GitCommit: v.Commit, BuildTime: v.Time, Profile: "release", Compiler: runtime.Version(),
	}}
	if n := c.o.Nydusd; n.ID != "" {
		info.ID = &n.ID
	}
	if n := c.o.Nydusd; n.Supervisor != "" {
		info.Supervisor = &n.Supervisor
	}
	c.mu.Lock()
	d := c.daemon
	info.State = c.state
	c.mu.Unlock()
	if d != nil {
		info.Backends = d.backends()
	}
	return info
}

// backends lists the mounts.
func (d *Daemon) backends() map[string]nydus.Backend {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out map[string]nydus.Backend
	for point, m := range d.mounts {
		if m.img == nil {
			continue
		}
		if out == nil {
			out = map[string]nydus.Backend{}
		}
		out[point] = nydus.Backend{Type: "Rafs", Mountpoint: point, Mounted: nydus.MountTime(m.since)}
	}
	return out
}

// SetLogLevel changes the least level that is logged.
func (c *Control) SetLogLevel(level string) error {
	if c.o.Nydusd.SetLevel == nil {
		return nydus.Unsupported()
	}
	return c.o.Nydusd.SetLevel(level)
}

// Events returns the last errors.
func (c *Control) Events() nydus.Events {
	d, err := c.running()
	if err != nil {
		return nydus.Events{MaxErrors: maxEvents, MaxSize: maxEventBytes, Errors: []string{}}
	}
	return d.events.list()
}

// Exit ends the process.
func (c *Control) Exit(context.Context) error {
	c.log.Info("told to exit")
	c.hurry()
	c.quit()
	return nil
}
